"""Parts of documents that mean something of their own: answers, and turns of a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float32, Int64

SpanKind = Literal["answer", "system", "user", "assistant", "tool", "second"]
KINDS: tuple[SpanKind, ...] = get_args(SpanKind)  # stores have their numbers: add at the end
SETS, BITS = 4, 15  # most sets of classes that a word has, and bits of the number of one
CLASSES = (1 << BITS) - 1  # most classes of a set


class Span(NamedTuple):
    """A part of a document's text: an answer to the rest, its prompt, or a turn of one role.

    Spans of a document rise and do not overlap. Text is cut at their borders before it is
    tokenized, so that each has tokens of its own.
    """

    first: int  # character of the text at which it begins
    end: int  # one past its last character
    kind: SpanKind  # an answer, the role of who speaks, or the second text of a pair
    opening: str = ""  # name of the special token that is put before its tokens; empty: none
    closing: str = ""  # of the one behind them


@dataclasses.dataclass(frozen=True)
class RowSpans:
    """Spans that have tokens in some rows, or stand right before or behind one of their tokens.

    Borders are counted from a row's first token and are not cut to the row: a span that begins
    before the row has a negative `first`, and one that goes on behind it an `end` beyond it. Only
    what begins before a part of a document that `WholeDocuments` has cut begins with that part.
    They are in the order of rows, and of tokens in each.

    Attributes:
      row: number of the row that each span is in.
      first: its first token; what opens it is not counted.
      end: one past its last token; what closes it is not counted.
      kind: its number in `KINDS`, or a negative one of classes (`class_code`).
      weight: of the loss of its document (`LossWeights`); None: all have 1.
    """

    row: Int64[np.ndarray, "spans"]
    first: Int64[np.ndarray, "spans"]
    end: Int64[np.ndarray, "spans"]
    kind: Int64[np.ndarray, "spans"]
    weight: Float32[np.ndarray, "spans"] | None = None

    @classmethod
    def none(cls) -> RowSpans:
        """Spans of rows without any."""
        return cls(*np.zeros((4, 0), np.int64))

    def of(self, row: int, kind: SpanKind) -> Int64[np.ndarray, "found 2"]:
        """First token and one past the last of a row's spans of one kind."""
        here = slice(*np.searchsorted(self.row, [row, row + 1]))
        found = np.stack([self.first[here], self.end[here]], axis=1)
        return found[self.kind[here] == KINDS.index(kind)]

    def of_kind(self, kind: SpanKind) -> RowSpans:
        """The spans of one kind."""
        return self.select(self.kind == KINDS.index(kind))

    def select(self, wanted: Bool[np.ndarray, "spans"]) -> RowSpans:
        """Some of the spans, in the same rows."""
        return self._map(lambda column: column[wanted])

    def mask(self, shape: tuple[int, int]) -> Bool[np.ndarray, "rows row_length"]:
        """Mask of the tokens of rows of this shape that are in a span."""
        found = np.zeros(shape, bool)
        low = np.clip(self.first, 0, shape[1])
        span, token = count_up(low, np.clip(self.end, low, shape[1]))
        found[self.row[span], token] = True
        return found

    def classes(
        self, shape: tuple[int, int], number: int, last: bool = False
    ) -> Int64[np.ndarray, "rows row_length"]:
        """Class of each word of rows of this shape, at one of its tokens; -1 everywhere else.

        Args:
          shape: rows, and tokens of a row.
          number: of the set of classes, from 0.
          last: whether the class stands at the last token of a word, and not at the first.
        """
        found = np.full(shape, -1, np.int64)
        at = self.end - 1 if last else self.first
        own = (self.kind < 0) & (at >= 0) & (at < shape[1])
        found[self.row[own], at[own]] = classes_of(self.kind[own], number)
        return found

    def take(self, rows: Int64[np.ndarray, "taken"]) -> RowSpans:
        """The spans of some rows, which are numbered anew."""
        low, high = (np.searchsorted(self.row, rows, side) for side in ("left", "right"))
        number, index = count_up(low, high)
        return dataclasses.replace(self._map(lambda column: column[index]), row=number)

    def weights(self, shape: tuple[int, int]) -> Float32[np.ndarray, "rows row_length"]:
        """Weights of the tokens of rows of this shape in the loss; 1 of those in no span."""
        found = np.ones(shape, np.float32)
        if self.weight is not None:
            low = np.clip(self.first, 0, shape[1])
            span, token = count_up(low, np.clip(self.end, low, shape[1]))
            found[self.row[span], token] = self.weight[span]
        return found

    def _map(self, function: Callable[[np.ndarray], np.ndarray]) -> RowSpans:
        """The spans with all their columns changed."""
        columns = self.row, self.first, self.end, self.kind, self.weight
        return RowSpans(*(None if column is None else function(column) for column in columns))


def class_code(classes: Sequence[int | None]) -> int | None:
    """The kind of a span that has classes of several sets, a negative number; None without any.

    Args:
      classes: number of the class of each set, from 0; None where there is none.
    """
    numbers = (0 if one is None else one + 1 for one in classes)
    code = sum(number << BITS * which for which, number in enumerate(numbers))
    return -code or None


def classes_of(kinds: Int64[np.ndarray, "spans"], number: int) -> Int64[np.ndarray, "spans"]:
    """Classes of one set, by its number from 0, of spans whose kinds are codes; -1 for none."""
    return (-kinds >> BITS * number & CLASSES) - 1


def count_up(
    low: Int64[np.ndarray, "pairs"], high: Int64[np.ndarray, "pairs"]
) -> tuple[Int64[np.ndarray, "numbers"], Int64[np.ndarray, "numbers"]]:
    """All numbers of the ranges `low` to `high`, the end excluded, each with its pair's number."""
    count = high - low
    pair = np.repeat(np.arange(len(low)), count)
    return pair, np.repeat(low - (np.cumsum(count) - count), count) + np.arange(len(pair))


def join_spans(rows: Sequence[Int64[np.ndarray, "_"]], parts: Sequence[RowSpans]) -> RowSpans:
    """Spans of all rows from those of several sets, each with the numbers of its rows."""
    if not parts:
        return RowSpans.none()
    row = np.concatenate([here[part.row] for here, part in zip(rows, parts, strict=True)])
    order = np.argsort(row, kind="stable")
    columns = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("first", "end", "kind")
    )
    weight = None
    if any(part.weight is not None for part in parts):
        ones = [np.ones(len(part.row), np.float32) for part in parts]
        given = [one if p.weight is None else p.weight for p, one in zip(parts, ones, strict=True)]
        weight = np.concatenate(given)[order]
    return RowSpans(row[order], *columns, weight)
