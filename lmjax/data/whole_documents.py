"""Rows of a token store that are filled with whole documents."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32, Int64

from lmjax.config import UserError
from lmjax.data.packing import best_fit
from lmjax.data.permutation import permute, random_bits
from lmjax.data.rows import Long, RowReader
from lmjax.data.spans import RowSpans, count_up
from lmjax.data.store import TokenStore


class WholeDocuments(RowReader):
    """Rows that are filled with whole documents, each once in an epoch.

    Which lengths stand together is planned once (`best_fit`); which documents of these lengths,
    their order in the row and the order of the rows are drawn anew in every epoch. So every epoch
    has as many rows, and any of them is found without the others. Where one token both ends and
    begins documents, it stands behind the last document of a row, too.

    A document that has no room in a row is dropped, or cut: it fills as many rows as it can, each
    of which begins with the last token of the one before, and what is left of it begins a row that
    others fill up: behind another document it would look like the beginning of one.

    The plan takes about 25 bytes of memory a document while it is made, and 4 then.
    """

    def __init__(
        self,
        store: TokenStore,
        row_length: int,
        room: int | None = None,
        long: Long = "cut",
        repeats: Int64[np.ndarray, "documents"] | None = None,
        weights: Float32[np.ndarray, "documents"] | None = None,
    ):
        """Plans the rows.

        Args:
          store: the tokens.
          row_length: tokens in a row.
          room: how many of them documents may fill; None: all.
          long: what becomes of documents that have no room.
          repeats: how often each document is read in an epoch; None: once.
          weights: of the documents in the loss, told with their spans; None: 1.

        Raises:
          UserError: a row has no room, or no document fits.
        """
        self.store, self.row_length = store, row_length
        self.room = row_length if room is None else min(room, row_length)
        if self.room < 2:
            raise UserError(f"rows have room for {self.room} tokens; they need at least 2")
        self._separator = store.manifest.separator
        most = self.room - (self._separator is not None)
        sizes, self._weights = self._sizes(store, most), weights
        # What is planned are readings, of which a document may have several in an epoch.
        self._read = None if repeats is None else np.repeat(np.arange(len(sizes)), repeats)
        if repeats is not None:
            sizes = sizes[self._read]
        self._readings, total = len(sizes), int(sizes.sum())
        too_long = np.flatnonzero(sizes > most)
        rest, self._filled = np.zeros_like(too_long), np.zeros_like(too_long)
        if long == "cut":
            self._filled = -((most - sizes[too_long]) // (self.room - 1))  # rows
            rest = sizes[too_long] - self._filled * (self.room - 1)
        self._long, self._long_tokens = long, int(sizes[too_long].sum())
        self._long_share = self._long_tokens / max(total, 1)
        self._too_long, self._filled_ends = too_long, np.cumsum(self._filled)
        used = total - self._long_tokens + int(rest.sum())
        used += int(self._filled.sum()) * self.room
        # Whole documents are of the kind of their size, rests of the kinds behind those.
        self._kinds = most + 1
        sizes[too_long] = np.where(rest, rest + self._kinds, 0)
        self._sort(sizes)
        self._packing = best_fit(*np.split(self._counts, 2))
        self.count = self._packing.rows + int(self._filled.sum())
        if not self.count:
            raise UserError(
                f"no document of {store.folder} fits into rows with room for {most} tokens; let "
                "long ones be cut (long_documents=cut), or take longer rows"
            )
        used += self._packing.rows * (self._separator is not None)
        self.padding = 1 - used / (self.count * row_length)  # share of the tokens of an epoch

    def _sort(self, kind: Int64[np.ndarray, "readings"]) -> None:
        """Puts readings in the order of their kinds."""
        # Few bits are sorted faster.
        order = np.argsort(kind.astype(np.min_scalar_type(2 * self._kinds - 1)), kind="stable")
        self._by_kind = order.astype(np.min_scalar_type(max(len(kind), 1)))
        self._counts = np.bincount(kind, minlength=2 * self._kinds)
        self._first = np.cumsum(self._counts) - self._counts

    def shuffle(
        self, number: Int64[np.ndarray, "rows"], seed: int, source: int
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """See `RowReader.shuffle`: the variant is the key of the epoch's permutations."""
        epoch, row = np.divmod(number, self.count)
        count = np.array([self.count])
        row = permute(row, count, random_bits(seed, source, epoch, 1))
        return row, random_bits(seed, source, epoch, 0).view(np.int64)

    def read(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> tuple[Int32[np.ndarray, "rows row_length"], Int32[np.ndarray, "rows row_length"]]:
        """See `RowReader.read`."""
        which, _, begin, size = self._documents(row, variant)
        column, number = _in_rows(which, size)
        tokens = np.zeros((len(row), self.row_length), np.int32)
        segments = np.zeros_like(tokens)
        piece, token = count_up(begin, begin + size)
        filled = which[piece], token + (column - begin)[piece]
        tokens[filled] = self.store.tokens[token]
        segments[filled] = number[piece]
        if self._separator is not None:
            packed = np.flatnonzero(row < self._packing.rows)
            behind = packed, (segments[packed] > 0).sum(axis=1)
            tokens[behind] = self._separator
            segments[behind] = segments[packed].max(axis=1, initial=0) + 1
        return tokens, segments

    def spans(self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]) -> RowSpans:
        """See `RowReader.spans`; what begins before a part of a cut document begins with it."""
        first, end, kind = self.store.spans
        which, document, begin, size = self._documents(row, variant)
        column, _ = _in_rows(which, size)
        edges = self.store.offsets[document], self.store.offsets[document + 1]
        low = np.maximum(np.searchsorted(end, begin), np.searchsorted(first, edges[0]))
        high = np.minimum(
            np.searchsorted(first, begin + size, side="right"), np.searchsorted(first, edges[1])
        )
        piece, index = count_up(low, np.maximum(low, high))
        shift = (column - begin)[piece]
        return RowSpans(
            which[piece],
            np.maximum(first[index], begin[piece]) + shift,
            end[index] + shift,
            kind[index],
            None if self._weights is None else self._weights[document[piece]],
        )

    def note(self) -> str:
        """See `RowReader.note`."""
        return f"{self.count:,} rows of whole documents, with {self.padding:.1%} padding"

    def warning(self) -> str:
        """See `RowReader.warning`: documents that are longer than a row."""
        if not len(self._too_long):
            return ""
        done = "cut" if self._long == "cut" else "left out (long_documents=drop)"
        return (
            f"{len(self._too_long):,} of {self._readings:,} documents, with "
            f"{self._long_share:.1%} of the tokens, have no room in a row of "
            f"{self.room:,} tokens and are {done}"
        )

    def _sizes(self, store: TokenStore, most: int) -> Int64[np.ndarray, "documents"]:
        """Room that each document takes in a row; of more than `most` it is too long."""
        return np.diff(store.offsets)

    def _documents(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> tuple[
        Int64[np.ndarray, "pieces"],
        Int64[np.ndarray, "pieces"],
        Int64[np.ndarray, "pieces"],
        Int64[np.ndarray, "pieces"],
    ]:
        """Pieces of the rows, in order: row, document, first token, number of tokens."""
        is_packed = row < self._packing.rows
        packed, filled = np.flatnonzero(is_packed), np.flatnonzero(~is_packed)
        which, document, size = self._packed(row[packed], variant[packed])
        document = self._document(document)
        begin = self.store.offsets[document + 1] - size
        # Rows that a part of one document fills.
        number = row[filled] - self._packing.rows
        kind = np.searchsorted(self._filled_ends, number, side="right")
        part = number - (self._filled_ends - self._filled)[kind]
        long = self._document(self._too_long[kind])
        found = [
            (packed[which], filled),
            (document, long),
            (begin, self.store.offsets[long] + part * (self.room - 1)),
            (size, np.full(len(filled), self.room)),
        ]
        columns = [np.concatenate(pair) for pair in found]
        order = np.argsort(columns[0], kind="stable")
        return tuple(column[order] for column in columns)

    def _document(self, reading: Int64[np.ndarray, "pieces"]) -> Int64[np.ndarray, "pieces"]:
        """The document of each reading of an epoch."""
        return reading if self._read is None else self._read[reading]

    def _packed(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> tuple[
        Int64[np.ndarray, "pieces"], Int64[np.ndarray, "pieces"], Int64[np.ndarray, "pieces"]
    ]:
        """Row, reading and number of tokens of what stands in packed rows."""
        plan = self._packing
        group = np.searchsorted(plan.ends, row, side="right")
        inside = row - np.append(0, plan.ends)[group]
        in_row, pair = count_up(plan.pairs[group], plan.pairs[group + 1])
        first = plan.before[pair] + inside[in_row] * plan.each[pair]
        of_pair, slot = count_up(first, first + plan.each[pair])
        which, kind = in_row[of_pair], plan.kind[pair[of_pair]]
        # Documents of a kind change places with each other.
        slot = permute(slot, self._counts[kind], random_bits(variant[which], kind))
        document = self._by_kind[self._first[kind] + slot].astype(np.int64)
        order = np.lexsort((random_bits(variant[which], document, 1), kind < self._kinds, which))
        return which[order], document[order], (kind % self._kinds)[order]


def _in_rows(
    which: Int64[np.ndarray, "pieces"], size: Int64[np.ndarray, "pieces"]
) -> tuple[Int64[np.ndarray, "pieces"], Int64[np.ndarray, "pieces"]]:
    """Column in its row at which each piece begins, and its number there, from 1."""
    first = np.searchsorted(which, which)  # number of the row's first piece
    before = np.cumsum(size) - size
    return before - before[first], 1 + np.arange(len(which)) - first
