"""Rows of requests with their replies, for models that read the two apart."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from lmjax.data.rows import Long, WholeDocuments
from lmjax.data.spans import KINDS
from lmjax.data.store import TokenStore


class RequestRows(WholeDocuments):
    """Rows of whole documents whose requests have room in one text, and their replies in another.

    A document's reply is its last one, and the request all before it, which gets an end. A row has
    documents as long as neither the requests nor the replies of it have more than `room` tokens. Of
    a request that is longer the last tokens are taken, and of a reply the first ones.
    """

    def __init__(
        self,
        store: TokenStore,
        row_length: int,
        room: int,
        long: Long = "cut",
        repeats: Int64[np.ndarray, "documents"] | None = None,
        weights: Float32[np.ndarray, "documents"] | None = None,
    ):
        """Plans the rows.

        Args:
          store: the tokens.
          row_length: tokens in a row, twice the room.
          room: tokens for the requests of a row, and for its replies.
          long: what becomes of documents that have no room.
          repeats, weights: see `WholeDocuments`.

        Raises:
          UserError: a row has no room, or no document fits.
        """
        self._replies, self._clips = last_replies(store), long == "cut"
        super().__init__(store, row_length, room, long, repeats, weights)
        most = self.room - (self._separator is not None)
        sides = self._sides(store)
        self._no_room = int((sides > most).sum())
        requests, replies = self._replies - store.offsets[:-1], store.offsets[1:] - self._replies
        taken = np.minimum(requests, most - 1) + np.minimum(replies, most)
        taken = np.where((sides <= most) | self._clips, taken, 0)
        used = int((taken if repeats is None else taken * repeats).sum())
        self.padding = 1 - used / (self.count * row_length)

    def warning(self) -> str:
        """See `RowReader.warning`: documents with a request or a reply that is too long."""
        if not self._no_room:
            return ""
        done = "cut" if self._clips else "left out (long_documents=drop)"
        return (
            f"{self._no_room:,} of {self.store.manifest.documents:,} requests or replies have no "
            f"room in {self.room:,} tokens and are {done}"
        )

    def _sides(self, store: TokenStore) -> Int64[np.ndarray, "documents"]:
        """Room that each document needs: that of its request with an end, or of its reply."""
        requests, replies = self._replies - store.offsets[:-1], store.offsets[1:] - self._replies
        return np.maximum(requests + 1, replies)

    def _sizes(self, store: TokenStore, most: int) -> Int64[np.ndarray, "documents"]:
        """See `WholeDocuments._sizes`."""
        sides = self._sides(store)
        return np.minimum(sides, most) if self._clips else sides

    def _documents(
        self, row: Int64[np.ndarray, "rows"], variant: Int64[np.ndarray, "rows"]
    ) -> tuple[
        Int64[np.ndarray, "pieces"],
        Int64[np.ndarray, "pieces"],
        Int64[np.ndarray, "pieces"],
        Int64[np.ndarray, "pieces"],
    ]:
        """See `WholeDocuments._documents`."""
        which, document, _, _ = super()._documents(row, variant)
        most, edge = self.room - (self._separator is not None), self._replies[document]
        begin = np.maximum(self.store.offsets[document], edge - most + 1)
        end = np.minimum(self.store.offsets[document + 1], edge + most)
        return which, document, begin, end - begin


def last_replies(store: TokenStore) -> Int64[np.ndarray, "documents"]:
    """The first token of each document's last reply; one past its last token where it has none."""
    first, _, kind = store.spans
    first = np.asarray(first)[np.asarray(kind) == KINDS.index("assistant")]
    found = np.array(store.offsets[1:], np.int64)
    # Of several in a document, which rise, the last one stays.
    found[np.searchsorted(store.offsets, first, side="right") - 1] = first
    return found
