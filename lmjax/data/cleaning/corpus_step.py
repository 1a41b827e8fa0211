"""The contract of steps that see all documents before they decide on one: duplicates, leaks."""

from __future__ import annotations

import abc
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.config import UserError, config, fingerprint, replace
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document

# Small arrays by name: about the documents of a shard, or what was decided on them.
Arrays = Mapping[str, np.ndarray]
KEPT = "kept"  # folder in the output of a cleaning: marks of what its corpus steps kept


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

    def kept(self, marks: Arrays, verdict: Arrays) -> Arrays:
        """Marks of what is kept of a shard, for later corpora to be compared with; empty: none."""
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


class Column(Sequence[np.ndarray]):
    """The array of one name of all shards, each read when it is asked for."""

    def __init__(self, shards: Sequence[Arrays], name: str) -> None:
        """The shards, and the name."""
        self._shards, self._name = shards, name

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._shards[number][self._name]


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


def sampled_pairs(numbers: np.ndarray, firsts: np.ndarray, most: int = 12) -> list[tuple[int, int]]:
    """Some pairs of a document and its first copy, from all over the corpus."""
    chosen = np.unique(np.linspace(0, len(numbers) - 1, min(most, len(numbers))).astype(np.int64))
    return [(int(firsts[n]), int(numbers[n])) for n in chosen]


def edges(shards: Sequence[Arrays], name: str) -> np.ndarray:
    """Number of the first row of each shard's array, and of all rows at the end."""
    return np.concatenate([[0], np.cumsum([len(shard[name]) for shard in shards])]).astype(np.int64)
