"""Vectors of documents, by which those of like meaning are found."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from lmjax.config import UserError, config
from lmjax.data.cleaning.contamination import run_hashes, word_hashes
from lmjax.data.cleaning.near_duplicates import tokens
from lmjax.data.documents import Document

ORDERS = (1, 2)  # words of the n-grams of `HashedWords`


@config
class Embedder(abc.ABC):
    """Base of what makes vectors of documents; `lmjax.generation.embeddings` has one by a model."""

    @abc.abstractmethod
    def vectors(self, documents: Sequence[Document]) -> Float32[np.ndarray, "documents width"]:
        """A vector for each document, of any length but zero.

        Raises:
            UserError: a document has none.
        """


@config
class HashedWords(Embedder):
    """Counts of words and pairs of words, hashed with signs into few numbers.

    (Weinberger et al. 2009, arXiv:0902.2206.) The square root of a count is taken, so that common
    words do not decide. It needs no model, and sees words but no meaning.
    """

    width: int = 512  # numbers of a vector

    def validate(self) -> None:
        """Raises UserError for vectors without numbers."""
        if self.width < 8:
            raise UserError(f"width={self.width}: must be 8 or more")

    def vectors(self, documents: Sequence[Document]) -> Float32[np.ndarray, "documents width"]:
        """See `Embedder.vectors`; a text without words has the same vector as any other such."""
        found = np.zeros((len(documents), self.width), np.float32)
        for row, document in zip(found, documents, strict=True):
            words = word_hashes(tokens(document.text))
            for order in ORDERS:
                hashes, counts = np.unique(run_hashes(words, order), return_counts=True)
                hashes = hashes * np.uint64(0x9E3779B97F4A7C15)
                signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
                at = (hashes >> np.uint64(20)) % np.uint64(self.width)
                np.add.at(row, at.astype(np.int64), signs * np.sqrt(counts))
            if not row.any():
                row[0] = 1.0
        return found


@config
class GivenVectors(Embedder):
    """Vectors that the documents bring with them, as a list of numbers in their metadata."""

    field: str = "embedding"  # name of the metadata

    def vectors(self, documents: Sequence[Document]) -> Float32[np.ndarray, "documents width"]:
        """See `Embedder.vectors`."""
        rows = []
        for document in documents:
            given = (document.metadata or {}).get(self.field)
            try:
                row = np.asarray(given, np.float32)
            except (TypeError, ValueError):
                row = np.zeros(0, np.float32)
            if row.ndim != 1 or not row.any() or not np.isfinite(row).all():
                raise UserError(
                    f"{document.identity}: the metadata {self.field!r} is no list of numbers: "
                    f"{str(given)[:60]}"
                )
            if rows and len(row) != len(rows[0]):
                raise UserError(
                    f"{document.identity}: {len(row)} numbers, those before have {len(rows[0])}"
                )
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, 1), np.float32)
