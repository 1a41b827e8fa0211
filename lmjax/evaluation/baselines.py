"""Baselines of a language model: gzip, and a bigram model of bytes, in bits per byte.

Bits per byte compare models with different tokenizers: all the bits that the model spends on a
text, the end of each document included, divided by the text's length in UTF-8 bytes.
"""

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int64

BOUNDARY = 256  # stands before the first and after the last byte of a document
SYMBOLS = 257
BLOCK = 1 << 20  # bytes that are counted at a time

GZIP_CONTAINER = 31  # zlib's name for "15-bit window, gzip header"


def gzip_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of `gzip -9` over the documents joined into one stream.

    Gzip learns nothing from the training text, and sees at most 32 KiB back.
    Raises ValueError where the documents hold no byte.
    """
    compressor = zlib.compressobj(9, zlib.DEFLATED, GZIP_CONTAINER)
    length = compressed = 0
    for document in documents:
        length += len(document)
        compressed += len(compressor.compress(document))
    compressed += len(compressor.flush())
    if not length:
        raise ValueError("there is no text to compress")
    return 8 * compressed / length


class ByteBigram:
    """Probability of a byte given the byte before it, counted on the training text.

    Every pair starts with half a count (Krichevsky and Trofimov, "The performance of universal
    encoding", 1981), so that no text has probability zero. The end of a document is a symbol to
    predict as well, as it is for the language model.
    """

    def __init__(self) -> None:
        self.counts: Int64[np.ndarray, "before after"] = np.zeros((SYMBOLS, SYMBOLS), np.int64)

    def fit(self, documents: Iterable[bytes]) -> "ByteBigram":
        """Add the pairs of these documents to the counts; returns itself."""
        for pairs, _ in _pairs(documents):
            self.counts += pairs
        return self

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Bits that the model spends on the documents, per byte of them.

        Raises ValueError where the documents hold no byte.
        """
        smoothed = self.counts + 0.5
        bits = -np.log2(smoothed / smoothed.sum(axis=1, keepdims=True))
        length, total = 0, 0.0
        for pairs, count in _pairs(documents):
            length += count
            total += float((pairs * bits).sum())
        if not length:
            raise ValueError("there is no text to predict")
        return total / length


def _pairs(
    documents: Iterable[bytes],
) -> Iterator[tuple[Int64[np.ndarray, "before after"], int]]:
    """Yields (how often each pair stands in some of the documents, bytes of these documents)."""
    # One boundary between two documents ends the one and begins the other.
    block, length = [np.array([BOUNDARY])], 0
    for document in documents:
        block += [np.frombuffer(document, np.uint8), np.array([BOUNDARY])]
        length += len(document)
        if length >= BLOCK:
            yield _count(block), length
            block, length = [np.array([BOUNDARY])], 0
    yield _count(block), length


def _count(block: list[np.ndarray]) -> Int64[np.ndarray, "before after"]:
    symbols = np.concatenate(block).astype(np.int64)
    pairs = symbols[:-1] * SYMBOLS + symbols[1:]
    return np.bincount(pairs, minlength=SYMBOLS * SYMBOLS).reshape(SYMBOLS, SYMBOLS)
