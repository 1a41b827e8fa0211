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


def earlier_marks(folders: Sequence[str], step: CorpusStep, names: Sequence[str]) -> list[Arrays]:
    """Marks that earlier cleanings have kept, file by file.

    Args:
        folders: the outputs of these cleanings.
        step: with the settings that theirs must have had.
        names: of the arrays.

    Raises:
        UserError: a folder holds none of these.
    """
    found: list[Arrays] = []
    for folder in folders:
        kept = pathlib.Path(folder).expanduser() / KEPT / kept_name(step)
        paths = sorted(kept.glob(f"*.{names[0]}.npy"))
        if not paths:
            raise UserError(
                f"earlier={folder} has no marks of {type(step).__name__} with these settings "
                f"(there is no {kept}): give the output of a cleaning with the same step"
            )
        stems = [path.name.split(".")[0] for path in paths]
        found += [
            {name: np.load(kept / f"{stem}.{name}.npy", mmap_mode="r") for name in names}
            for stem in stems
        ]
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
