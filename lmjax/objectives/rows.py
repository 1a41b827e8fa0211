"""Rows cut into samples, and samples put into rows of a fixed shape."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError
from lmjax.models.batch import Batch
from lmjax.objectives.example import Example, TokenTargets


class RowPiece(NamedTuple):
    """Consecutive tokens of a row that are trained on together.

    Attributes:
      tokens: a document, its part that the row holds, or several of them.
      closed: whether the next document of the row begins behind it, so that it is whole at its end.
      documents: of how many documents it has tokens.
    """

    tokens: Int[np.ndarray, "piece"]
    closed: bool
    documents: int


def pieces(
    tokens: Int[np.ndarray, "row_length"],
    segments: Int[np.ndarray, "row_length"],
    cross_documents: bool = False,
    samples: int = 1,
) -> Iterator[RowPiece]:
    """The pieces of one row, in their order.

    Args:
      tokens: of the row.
      segments: which document each belongs to; 0 is padding and in no piece.
      cross_documents: documents of a sample stay together.
      samples: equal parts that the row is cut into first.
    """
    size = len(tokens)
    cut = np.zeros(size, bool)
    cut[[0, *(size * number // samples for number in range(1, samples))]] = True
    compared = (segments > 0).astype(np.int32) if cross_documents else segments
    cut[1:] |= compared[1:] != compared[:-1]
    edges = [*np.flatnonzero(cut).tolist(), size]
    for first, end in itertools.pairwise(edges):
        if segments[first]:
            closed = end < size and 0 != segments[end] != segments[end - 1]
            documents = int(segments[end - 1] - segments[first]) + 1
            yield RowPiece(tokens[first:end], closed, documents)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One segment of a row, of one dimension; fields as in `Batch`, and its targets' weights.

    Positions and ranks count from the sample's beginning; None where they are the places in it.
    """

    tokens: Int[np.ndarray, "sample"]
    targets: Int[np.ndarray, "sample"]
    weights: Float[np.ndarray, "sample"]
    positions: Int[np.ndarray, "sample"] | None = None
    ranks: Int[np.ndarray, "sample"] | None = None
    block_positions: Int[np.ndarray, "sample"] | None = None
    token_types: Int[np.ndarray, "sample"] | None = None


ALWAYS = ("tokens", "positions", "segments")


class Rows:
    """Arrays of an example, filled with samples from the left; the rest of each row is padding."""

    def __init__(self, rows: int, length: int, *optional: str):
        """`optional` names the integer fields of `Batch` that there are besides the usual ones."""
        self.length = length
        self.used = np.zeros(rows, np.int64)
        self._count = np.zeros(rows, np.int64)
        self._targets = np.zeros((rows, length), np.int32)
        self._weights = np.zeros((rows, length), np.float32)
        self._arrays = {name: np.zeros((rows, length), np.int32) for name in (*ALWAYS, *optional)}
        if "ranks" in optional:
            self._arrays["ranks"][:] = np.arange(length)

    def room(self, row: int) -> int:
        """Number of tokens that still fit into a row."""
        return self.length - int(self.used[row])

    def add(self, row: int, sample: Sample) -> None:
        """Puts a sample behind those that the row has, as a segment of its own."""
        first, size = int(self.used[row]), len(sample.tokens)
        here = slice(first, first + size)
        self.used[row] += size
        self._count[row] += 1
        self._targets[row, here] = sample.targets
        self._weights[row, here] = sample.weights
        for name, array in self._arrays.items():
            if name == "segments":
                array[row, here] = self._count[row]
                continue
            values = getattr(sample, name)
            if values is None and name in ("positions", "ranks"):
                values = np.arange(size)
            if values is not None:
                array[row, here] = values + first if name == "ranks" else values

    def batch(self, encoder: Batch | None = None) -> Batch:
        """The inputs, beside those of an encoder."""
        return Batch(**self._arrays, encoder=encoder)

    def targets(self) -> TokenTargets:
        """The targets with their weights."""
        return TokenTargets(self._targets, self._weights)

    def example(self, encoder: Batch | None = None) -> Example:
        """Inputs and targets."""
        return Example(self.batch(encoder), self.targets())


def require_targets(
    weights: Float[np.ndarray, "rows seq"], segments: Int[np.ndarray, "rows row_length"], what: str
) -> None:
    """Raises UserError where rows full of text hold nothing to predict: no document has room.

    `what` says for what. Rows with padding do not count: they may be the last of a set.
    """
    full = (segments > 0).all(axis=1)
    if full.any() and not weights.any():
        longest = max(np.bincount(row).max() for row in segments[full])
        raise UserError(
            f"the text has no room for {what}: the longest of the documents in {full.sum()} whole "
            f"rows has {longest} tokens, its begin and end counted. Train on longer documents, or "
            "put several into one (cross_documents=True where the objective has it)"
        )
