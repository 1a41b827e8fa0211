"""The contract of steps that see all documents before they decide on one: duplicates, leaks."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
import shutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lmjax.config import UserError, config, fingerprint, replace
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document

# Small arrays by name: about the documents of a shard, or what was decided on them.
Arrays = Mapping[str, np.ndarray]
KEPT = "kept"  # folder in the output of a cleaning: marks of what its corpus steps kept
ROWS = 1 << 12  # of an array that are copied together
TOGETHER = 1 << 14  # marks that are compared together: a few megabytes of memory
MOST_ROUNDS = 64  # in which the marks of a corpus are compared: each reads them all


class Decided(NamedTuple):
    """Decisions of a corpus step.

    Attributes:
        verdicts: for each shard what `CorpusStep.apply` needs of it.
        common: what it needs for all shards.
        pairs: numbers of documents, over all shards, of which the second was found to repeat the
            first: for the report.
    """

    verdicts: list[Arrays]
    common: Arrays = types.MappingProxyType({})
    pairs: Sequence[tuple[int, int]] = ()


Tell = Callable[[Document, str], None]  # is told what a step found in a document


@config
class CorpusStep(abc.ABC):
    """Base of the steps that need all documents: marks of each, a decision, its application.

    Documents have an order: that of the collections, which is their priority, and within one that
    of its files. What a step decides depends on it alone.
    """

    @abc.abstractmethod
    def mark(self, documents: Sequence[Document]) -> Arrays:
        """Small arrays about some documents; those of several calls are joined, one after another.

        Args:
            documents: of a shard, in order.
        """

    @abc.abstractmethod
    def decide(self, shards: Sequence[Arrays]) -> Decided:
        """Decides on all documents.

        Args:
            shards: the marks of each shard's documents, in order; mapped from files.

        Raises:
            UserError: see the step.
        """

    @abc.abstractmethod
    def apply(
        self, documents: Iterable[Document], verdict: Arrays, tell: Tell
    ) -> Iterator[Document | Dropped]:
        """Gives for each document of a shard, in order, the document or the reason to drop it.

        Args:
            documents: of a shard, taken one by one.
            verdict: on the shard, with what is common to all.
            tell: is told findings that have to be listed.
        """

    def kept(self, verdict: Arrays) -> Arrays:
        """Masks of a shard's marks, true for what is kept and later corpora are compared with.

        Args:
            verdict: on the shard.

        Returns:
            A mask of the rows of each array of marks that is needed; none by default.
        """
        return {}


class StoredArrays(Mapping[str, np.ndarray]):
    """Arrays in a folder, each mapped from its file when it is asked for.

    A corpus has more shards than a process may have open files.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """The folder, which need not be there: then there is none."""
        self._folder = folder

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            array = np.load(self._folder / f"{name}.npy", mmap_mode="r")
        except FileNotFoundError:
            raise KeyError(name) from None
        return np.asarray(array)  # numpy's own class for maps is slow in small operations

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._folder.glob("*.npy")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @classmethod
    def save(cls, folder: pathlib.Path, arrays: Arrays) -> None:
        """Writes arrays into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)


class GrowingArray:
    """Arrays that grow on the disk, not in memory, by rows; `StoredArrays` reads them."""

    def __init__(self, folder: pathlib.Path) -> None:
        """The folder, which is made."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._grown: dict[str, _Grown] = {}

    def add(self, arrays: Arrays) -> None:
        """Appends rows to each array; what these are like is the same in each call."""
        for name, array in arrays.items():
            grown = self._grown.setdefault(name, _Grown(array.dtype, array.shape[1:], []))
            grown.rows.append(len(array))
            # One row, or one column, lies both ways at once.
            grown.in_columns &= array.ndim == 2 and array.flags.f_contiguous
            with open(self._rows_of(name), "ab") as file:
                file.write(array.tobytes("A"))

    def select(self, arrays: Arrays, name: str, mask: Bool[np.ndarray, "rows"]) -> None:
        """Appends the rows of an array for which a mask is true, some at a time."""
        for start in range(0, max(len(mask), 1), ROWS):
            array = arrays[name]  # mapped anew: what was read of it is no longer in memory
            in_columns = array.ndim == 2 and array.flags.f_contiguous
            some = array[start : start + ROWS][mask[start : start + ROWS]]
            self.add({name: np.asfortranarray(some) if in_columns else np.ascontiguousarray(some)})

    def finish(self) -> None:
        """Stores the arrays, those whose columns lie together column by column."""
        for name, grown in self._grown.items():
            about = {
                "descr": np.lib.format.dtype_to_descr(grown.dtype),
                "fortran_order": grown.in_columns,
                "shape": (sum(grown.rows), *grown.shape),
            }
            with (
                open(self._rows_of(name), "rb") as rows,
                open(self._folder / f"{name}.npy", "wb") as file,
            ):
                np.lib.format.write_array_header_1_0(file, about)
                if grown.in_columns:
                    grown.write_columns(rows, file)
                else:
                    shutil.copyfileobj(rows, file)
            self._rows_of(name).unlink()

    def _rows_of(self, name: str) -> pathlib.Path:
        return self._folder / f"{name}.rows"


@dataclasses.dataclass
class _Grown:
    """An array of a `GrowingArray`.

    Attributes:
        dtype: of it.
        shape: of a row.
        rows: of each block.
        in_columns: whether in each block the columns lie together.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    rows: list[int]
    in_columns: bool = True

    def write_columns(self, blocks: BinaryIO, file: BinaryIO) -> None:
        """Writes column after column of all blocks."""
        (columns,) = self.shape
        for column in range(columns):
            begin = 0
            for rows in self.rows:
                size = rows * self.dtype.itemsize
                blocks.seek(begin + column * size)
                file.write(blocks.read(size))
                begin += columns * size


class Column(Sequence[np.ndarray]):
    """The array of one name of all shards, or a column of it, each read when it is asked for."""

    def __init__(self, shards: Sequence[Arrays], name: str, column: int | None = None) -> None:
        """The shards, the name, and the number of a column; None: all."""
        self._shards, self._name, self._column = shards, name, column

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> np.ndarray:
        array = self._shards[number][self._name]
        return array if self._column is None else array[:, self._column]


def in_rounds(
    parts: Sequence[np.ndarray], together: int = TOGETHER
) -> Iterator[tuple[Int[np.ndarray, "some"], np.ndarray]]:
    """Numbers of rows over several arrays, and these rows, some at a time.

    Equal rows come together, and rise in number. However many rows there are, those that are in
    memory are about `together`, or one of `MOST_ROUNDS` of all where that is more.

    Args:
        parts: arrays of unsigned integers, whose first column is a hash; each is asked for once a
            round, and not kept.
        together: rows of a round.
    """
    begins = np.cumsum([0, *(len(part) for part in parts)])
    rounds = min(MOST_ROUNDS, max(1, -(-int(begins[-1]) // together)))
    for number in range(rounds):
        numbers, rows = [], []
        for part, begin in zip(parts, begins.tolist()):
            first = part if part.ndim == 1 else part[:, 0]
            chosen = np.flatnonzero(first % np.uint64(rounds) == number)
            rows.append(np.asarray(part[chosen]))
            numbers.append(chosen + begin)
        if numbers:
            yield np.concatenate(numbers), np.concatenate(rows)


def earlier_marks(folders: Sequence[str], step: CorpusStep) -> list[Arrays]:
    """Marks that earlier cleanings have kept, shard by shard.

    Args:
        folders: the outputs of these cleanings.
        step: with the settings that theirs must have had.

    Raises:
        UserError: a folder holds none of these.
    """
    found: list[Arrays] = []
    for folder in folders:
        kept = pathlib.Path(folder).expanduser() / KEPT / kept_name(step)
        if not kept.is_dir():
            raise UserError(
                f"earlier={folder} has no marks of {type(step).__name__} with these settings "
                f"(there is no {kept}): give the output of a cleaning with the same step"
            )
        found += map(StoredArrays, sorted(kept.iterdir()))
    return found


def kept_name(step: CorpusStep) -> str:
    """Name of the folder for the marks of a step: marks of other settings do not compare."""
    return f"{type(step).__name__}-{fingerprint(replace(step, earlier=()))}"


def sampled_pairs(
    copies: Int[np.ndarray, "copies"], firsts: Int[np.ndarray, "documents"], most: int = 12
) -> list[tuple[int, int]]:
    """Some pairs of a first document and a copy of it, from all over the corpus.

    Args:
        copies: numbers of documents.
        firsts: number of the first one for each document.
        most: pairs.
    """
    chosen = np.unique(np.linspace(0, len(copies) - 1, min(most, len(copies))).astype(np.int64))
    return [(int(firsts[number]), int(number)) for number in copies[chosen].tolist()]


def edges(shards: Sequence[Arrays], name: str) -> np.ndarray:
    """Number of the first row of each shard's array, and of all rows at the end."""
    return np.concatenate([[0], np.cumsum([len(shard[name]) for shard in shards])]).astype(np.int64)
