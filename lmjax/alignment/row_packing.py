"""Texts packed: several in a row, none of which sees another."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Int, Shaped

from lmjax.models.batch import Batch
from pallas_kernels.attention import Branches


@dataclasses.dataclass(frozen=True)
class RowPacking:
    """Rows of texts, several in each.

    Attributes:
      sizes: tokens of each text; one without tokens has no place.
      row, first, slot: of each text: its row, its first token there, and its number in the row.
      rows, length: of the rows; some may be empty.
      begin: index of the first token of each text in the array that has it; None: 0.
    """

    sizes: Int[np.ndarray, "texts"]
    row: Int[np.ndarray, "texts"]
    first: Int[np.ndarray, "texts"]
    slot: Int[np.ndarray, "texts"]
    rows: int
    length: int
    begin: Int[np.ndarray, "texts"] | None = None

    @classmethod
    def one_each(cls, sizes: Int[np.ndarray, "texts"], length: int) -> RowPacking:
        """A row of its own for each text."""
        nothing = np.zeros(len(sizes), np.int64)
        return cls(sizes, np.arange(len(sizes)), nothing, nothing, len(sizes), length)

    @functools.cached_property
    def _indices(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Places of all tokens: (text, index in the text), (row, index in the row)."""
        texts = np.flatnonzero(self.sizes)
        sizes = self.sizes[texts]
        text = np.repeat(texts, sizes)
        index = np.concatenate([np.arange(0), *(np.arange(size) for size in sizes)])
        begin = 0 if self.begin is None else self.begin[text]
        return (text, begin + index), (self.row[text], self.first[text] + index)

    def pack(self, array: Shaped[np.ndarray, "texts most"]) -> Shaped[np.ndarray, "rows length"]:
        """Numbers of tokens, in the rows; 0 where no text is."""
        texts, rows = self._indices
        found = np.zeros((self.rows, self.length), array.dtype)
        found[rows] = array[texts]
        return found

    def unpack(
        self, array: Shaped[np.ndarray, "rows length"], most: int
    ) -> Shaped[np.ndarray, "texts most"]:
        """Numbers of tokens from the rows, a row for each text; 0 where it is not."""
        texts, rows = self._indices
        found = np.zeros((len(self.sizes), most), array.dtype)
        found[texts] = array[rows]
        return found

    def pack_batch(self, batch: Batch) -> Batch:
        """A batch of one text a row, packed: a text's number in its row tells segments apart."""
        segments, (texts, rows) = self.pack(batch.segments), self._indices
        segments[rows] *= (self.slot[texts[0]] + 1).astype(segments.dtype)
        return dataclasses.replace(
            batch,
            tokens=self.pack(batch.tokens),
            positions=self.pack(batch.positions),
            segments=segments,
        )


@dataclasses.dataclass(frozen=True)
class SharedRows:
    """Rows of requests, and behind them, in branches, the replies to them.

    A reply begins with the last token of its request, which predicts its first one, and ends before
    its own last one, behind which nothing is predicted. So all targets are in branches. A branch
    may have replies to different requests.

    Attributes:
      requests: tokens of each request but the last, of the text that has its first reply.
      replies: what else a model reads, of all texts; the slot of a reply is that of its request.
      branch: columns of a branch.
    """

    requests: RowPacking
    replies: RowPacking
    branch: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.requests.rows

    @property
    def length(self) -> int:
        """Columns of a row."""
        return self.requests.length + self.replies.length

    def pack(self, array: Shaped[np.ndarray, "texts most"]) -> Shaped[np.ndarray, "rows own"]:
        """Numbers of targets, in the columns of branches; see `RowPacking.pack`."""
        return self.replies.pack(array)

    def unpack(
        self, array: Shaped[np.ndarray, "rows own"], most: int
    ) -> Shaped[np.ndarray, "texts most"]:
        """Numbers of targets from the columns of branches; see `RowPacking.unpack`."""
        return self.replies.unpack(array, most)

    def pack_batch(self, batch: Batch) -> Batch:
        """A batch of one text a row, in these rows."""
        parts = (part.pack_batch(batch) for part in (self.requests, self.replies))
        found = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts)
        return dataclasses.replace(found, branches=Branches(self.requests.length, self.branch))


Rows = RowPacking | SharedRows


def best_fit(
    sizes: Int[np.ndarray, "texts"], room: int, most: int
) -> tuple[Int[np.ndarray, "texts"], Int[np.ndarray, "texts"], Int[np.ndarray, "texts"]]:
    """Row, first token and number in its row of each text; those of size 0 are at 0.

    The largest comes first, and each into the fullest row that has room.

    Args:
      sizes: of the texts, none above `room`.
      room: tokens of a row.
      most: texts of a row.
    """
    left: list[int] = []
    count: list[int] = []
    row, first, slot = (np.zeros(len(sizes), np.int64) for _ in range(3))
    for text in np.argsort(-sizes, kind="stable"):
        if not (size := int(sizes[text])):
            continue
        open_rows = [n for n, free in enumerate(left) if free >= size and count[n] < most]
        if not open_rows:
            open_rows = [len(left)]
            left.append(room)
            count.append(0)
        best = min(open_rows, key=lambda n: left[n])
        row[text], first[text], slot[text] = best, room - left[best], count[best]
        left[best] -= size
        count[best] += 1
    return row, first, slot
