"""Rows of documents that are compared with each other, such as answers to one request."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32, Int64

from lmjax.config import UserError
from lmjax.data.permutation import permute, random_bits
from lmjax.data.rows import Long, RowReader
from lmjax.data.spans import RowSpans, count_up
from lmjax.data.store import TokenStore


class Groups(RowReader):
    """Rows with a group of documents each, every document in a slot of its own.

    The first label of a document is its number in its group, and 0 begins one. Documents fill their
    slots from the left; of one that is too long the last tokens are taken, or the first ones and
    the last one, which may close it, or its whole group is left out. Documents beyond the slots are
    left out.
    """

    def __init__(
        self,
        store: TokenStore,
        row_length: int,
        slots: int,
        long: Long = "cut",
        keeps_begin: bool = False,
        repeats: Int64[np.ndarray, "documents"] | None = None,
    ):
        """Finds the groups.

        Args:
          store: documents with labels.
          row_length: tokens in a row, a multiple of `slots`.
          slots: most documents of a group.
          long: what becomes of documents that are longer than a slot.
          keeps_begin: whether a cut leaves the beginning of a document, and not its end.
          repeats: how often the group of each document is read in an epoch, by its first document;
            None: once.

        Raises:
          UserError: the documents are in no groups, or no group is left.
        """
        if not store.labels.shape[1]:
            raise UserError(
                f"data.rows=groups reads groups of documents; those of {store.folder} are in "
                "none. Take a source of comparisons, or of texts with labels"
            )
        self.store, self.row_length, self.slots, self._long = store, row_length, slots, long
        self.slot, self._keeps_begin = row_length // slots, keeps_begin
        begins = np.flatnonzero(store.labels[:, 0] == 0)
        sizes = np.diff(np.append(begins, store.manifest.documents))
        is_long = np.diff(store.offsets) > self.slot
        long_groups = np.add.reduceat(is_long, begins) > 0
        keep = np.ones(len(begins), bool) if long == "cut" else ~long_groups
        self._begins, self._sizes = begins[keep], np.minimum(sizes[keep], slots)
        self._counts = len(begins), int(long_groups.sum()), int((sizes > slots).sum())
        if repeats is not None:
            times = repeats[self._begins]
            self._begins, self._sizes = (np.repeat(a, times) for a in (self._begins, self._sizes))
        self.count = len(self._begins)
        if not self.count:
            raise UserError(
                f"no group of documents in {store.folder} fits into rows with {self.slot} tokens a "
                "document; let long ones be cut (long_documents=cut), or take longer rows"
            )

    def shuffle(
        self, number: Int64[np.ndarray, "rows"], seed: int, source: int
    ) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """See `RowReader.shuffle`; there is one variant."""
        epoch, row = np.divmod(number, self.count)
        count = np.array([self.count])
        return permute(row, count, random_bits(seed, source, epoch, 1)), np.zeros_like(row)

    def read(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> tuple[Int32[np.ndarray, "rows row_length"], Int32[np.ndarray, "rows row_length"]]:
        """See `RowReader.read`; segments are the numbers of slots from 1."""
        which, slot, document, begin, end = self._documents(row)
        tokens = np.zeros((len(row), self.row_length), np.int32)
        segments = np.zeros_like(tokens)
        piece, token = count_up(begin, end)
        filled = which[piece], token + (slot * self.slot - begin)[piece]
        tokens[filled] = self.store.tokens[token]
        segments[filled] = slot[piece] + 1
        if self._keeps_begin:
            last = self.store.offsets[document + 1] - 1
            cut = end <= last
            tokens[which[cut], (slot[cut] + 1) * self.slot - 1] = self.store.tokens[last[cut]]
        return tokens, segments

    def spans(self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]) -> RowSpans:
        """See `RowReader.spans`; what a cut goes through begins, or ends, with the slot."""
        first, end, kind = self.store.spans
        which, slot, _, begin, stop = self._documents(row)
        low, high = np.searchsorted(end, begin, "right"), np.searchsorted(first, stop)
        piece, index = count_up(low, np.maximum(low, high))
        shift = (slot * self.slot - begin)[piece]
        return RowSpans(
            which[piece],
            np.maximum(first[index], begin[piece]) + shift,
            np.minimum(end[index], stop[piece]) + shift,
            kind[index],
        )

    def labels(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> Float32[np.ndarray, "rows slots labels"]:
        """See `RowReader.labels`."""
        which, slot, document, _, _ = self._documents(row)
        found = np.full((len(row), self.slots, self.store.labels.shape[1]), np.nan, np.float32)
        found[which, slot] = self.store.labels[document]
        return found

    def documents(self, row: Int64[np.ndarray, "rows"]) -> Int64[np.ndarray, "documents"]:
        """Numbers in the store of the documents of some rows, in order."""
        return self._documents(row)[2]

    def note(self) -> str:
        """See `RowReader.note`."""
        return f"{self.count:,} groups of {self._sizes.mean():.3g} documents"

    def warning(self) -> str:
        """See `RowReader.warning`: groups with documents that are too long, or too many."""
        groups, long, large = self._counts
        cut = "cut at their end" if self._keeps_begin else "cut at their beginning"
        done = cut if self._long == "cut" else "left out"
        have = "documents have" if self.slots == 1 else "groups have documents of"
        words = []
        if long:
            words.append(
                f"{long:,} of {groups:,} {have} more than {self.slot:,} tokens, "
                f"and are {done} (long_documents={self._long})"
            )
        if large:
            words.append(
                f"{large:,} of {groups:,} groups have more than {self.slots} documents, of which "
                "the first are taken"
            )
        return "; ".join(words)

    def _documents(
        self, row: Int64[np.ndarray, "rows"]
    ) -> tuple[
        Int64[np.ndarray, "found"],
        Int64[np.ndarray, "found"],
        Int64[np.ndarray, "found"],
        Int64[np.ndarray, "found"],
        Int64[np.ndarray, "found"],
    ]:
        """Documents of the rows, in order: row, slot, number, first token, one past the last."""
        begins = self._begins[row]
        which, document = count_up(begins, begins + self._sizes[row])
        begin, end = self.store.offsets[document], self.store.offsets[document + 1]
        if self._keeps_begin:
            end = np.minimum(end, begin + self.slot)
        else:
            begin = np.maximum(begin, end - self.slot)
        return which, document - begins[which], document, begin, end
