"""Rows of a token store, and those that are cut from it as a ring."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from lmjax.config import UserError
from lmjax.data.permutation import permute, random_bits
from lmjax.data.spans import RowSpans, count_up
from lmjax.data.store import TokenStore

Long = Literal["cut", "drop"]


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """Format of the rows that an objective reads.

    Attributes:
      length: tokens of the store.
      overlap: tokens at the end of a row of text that the next one has too.
      room: how many of its tokens whole documents may fill; None: all.
      slots: documents of a row of groups, whose labels are read; None: rows are text.
      keeps_begin: whether a document that is longer than its slot keeps its beginning, not its end.
      reads_spans: whether answers and turns are read.
      replies_apart: whether requests and replies have `room` each, not both together.
    """

    length: int
    overlap: int = 1
    room: int | None = None
    slots: int | None = None
    keeps_begin: bool = False
    reads_spans: bool = False
    replies_apart: bool = False


class RowReader(abc.ABC):
    """Base of the ways to make rows of a store: a pure function of the number of a row.

    Attributes:
      store: the tokens.
      row_length: tokens in a row.
      count: rows in an epoch.
    """

    store: TokenStore
    row_length: int
    count: int

    @abc.abstractmethod
    def shuffle(
        self, number: Int64[np.ndarray, "rows"], seed: int, source: int
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """The order of training.

        Args:
          number: of rows, counted over all epochs.
          seed: of the run.
          source: number of the store among the sources of the run.

        Returns:
          Which row of an epoch each is, and the variant that its epoch is read in.
        """

    @abc.abstractmethod
    def read(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> tuple[Int32[np.ndarray, "rows row_length"], Int32[np.ndarray, "rows row_length"]]:
        """Tokens and segment ids: numbered from 1 in each row, a document each; 0 is filling."""

    @abc.abstractmethod
    def spans(self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]) -> RowSpans:
        """The spans of what `read` gives."""

    def labels(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> Float32[np.ndarray, "rows slots labels"]:
        """Labels of the documents in what `read` gives; NaN where a slot has no document.

        Raises:
          UserError: these rows have no slots for documents.
        """
        raise UserError(
            f"{self.store.folder}: rows of {type(self).__name__} do not tell the labels of their "
            "documents; set data.rows=groups"
        )

    def note(self) -> str:
        """Report of what is padding in the rows of an epoch; empty where hardly any is."""
        return ""

    def warning(self) -> str:
        """Report of what is not as it should be in the rows of an epoch; empty for nothing."""
        return ""


class Ring(RowReader):
    """A token store cut into rows of `row_length` tokens of which neighbours share `overlap`.

    The store is read as a ring: the token after the last is the first, so that each token is the
    target of a row of an epoch, with an overlap of 1 of exactly one. The last row of an epoch is
    filled up with tokens of segment 0. The ring is cut at a place of its own in every epoch.
    """

    def __init__(self, store: TokenStore, row_length: int, overlap: int = 1):
        if row_length < 2:
            raise UserError(f"rows have {row_length} tokens; they need at least 2")
        self.store = store
        self.row_length = row_length
        self.advance = row_length - overlap  # from one row's first token to the next one's
        self.count = -(-store.manifest.tokens // self.advance)  # rows in an epoch

    def shuffle(
        self, number: Int64[np.ndarray, "rows"], seed: int, source: int
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """See `RowReader.shuffle`: the variant is the token at which the epoch begins."""
        epoch, row = np.divmod(number, self.count)
        size = np.uint64(self.store.manifest.tokens)
        start = (random_bits(seed, source, epoch, 0) % size).astype(np.int64)
        count = np.array([self.count])
        return permute(row, count, random_bits(seed, source, epoch, 1)), start

    def read(
        self, row: Int64[np.ndarray, "rows"], start: int | Int64[np.ndarray, "rows"] = 0
    ) -> tuple[Int32[np.ndarray, "rows row_length"], Int32[np.ndarray, "rows row_length"]]:
        """Tokens and segment ids of some rows of an epoch that begins at token `start`.

        Segments are numbered from 1 in each row, a document each; 0 is filling.
        """
        size = self.store.manifest.tokens
        inner = np.asarray(row, np.int64) * self.advance
        first = (inner + start) % size
        index = first[:, None] + np.arange(self.row_length)
        tokens = np.take(self.store.tokens, index % size).astype(np.int32)
        segments = 1 + np.cumsum(self._boundaries(first, index), axis=1, dtype=np.int32)
        # The token at which the epoch began is its last target.
        filling = np.arange(self.row_length) > (size - inner)[:, None]
        tokens[filling] = 0
        segments[filling] = 0
        return tokens, segments

    def _boundaries(
        self, first: Int64[np.ndarray, "rows"], index: Int64[np.ndarray, "rows row_length"]
    ) -> Bool[np.ndarray, "rows row_length"]:
        """Mask of the tokens in the rows, after their first, that begin a document."""
        offsets, size = self.store.offsets, self.store.manifest.tokens
        documents = len(offsets) - 1
        laps, ends = np.divmod(index[:, -1], size)
        # Numbers of the documents that begin inside, counted on over laps of the ring.
        low = np.searchsorted(offsets[:-1], first, side="right")
        high = laps * documents + np.searchsorted(offsets[:-1], ends, side="right")
        row, number = count_up(low, high)
        lap, document = np.divmod(number, documents)
        found = np.zeros(index.shape, bool)
        found[row, offsets[document] + lap * size - first[row]] = True
        return found

    def spans(
        self, row: Int64[np.ndarray, "rows"], start: int | Int64[np.ndarray, "rows"] = 0
    ) -> RowSpans:
        """The spans of what `read` gives."""
        first, end, kind = self.store.spans
        size, spans = self.store.manifest.tokens, len(first)
        if not spans:
            return RowSpans.none()
        inner = np.asarray(row, np.int64) * self.advance
        begin = (inner + start) % size
        stop = begin + np.minimum(self.row_length, size - inner + 1)  # behind it is filling
        # Numbers of the spans, counted on over laps of the ring. What opens one stands before it.
        laps, last = np.divmod(stop, size)
        low = np.searchsorted(end, begin)
        high = laps * spans + np.searchsorted(first, last, side="right")
        found, number = count_up(low, high)
        lap, index = np.divmod(number, spans)
        shift = lap * size - begin[found]
        return RowSpans(found, first[index] + shift, end[index] + shift, kind[index])


class EvaluationRows:
    """The rows of a held-out store in order, each once."""

    def __init__(self, rows: RowReader):
        self._rows = rows

    def __len__(self) -> int:
        return self._rows.count

    def read(
        self, first: int, count: int
    ) -> tuple[Int32[np.ndarray, "count row_length"], Int32[np.ndarray, "count row_length"]]:
        """Tokens and segment ids of `count` rows from `first`; rows after the last are filling."""
        row = np.arange(first, first + count)
        tokens, segments = self._rows.read(np.minimum(row, len(self) - 1), np.zeros_like(row))
        after = row >= len(self)
        tokens[after] = 0
        segments[after] = 0
        return tokens, segments

    def spans(self, first: int, count: int) -> RowSpans:
        """The spans of what `read` gives."""
        row = np.arange(first, min(first + count, len(self)))
        return self._rows.spans(row, np.zeros_like(row))

    def labels(self, first: int, count: int) -> Float32[np.ndarray, "count slots labels"]:
        """The labels of what `read` gives; NaN in filling."""
        row = np.arange(first, first + count)
        found = self._rows.labels(np.minimum(row, len(self) - 1), np.zeros_like(row))
        return np.where((row >= len(self))[:, None, None], np.float32(np.nan), found)
