"""Near-duplicates by MinHash (Broder 1997) and locality-sensitive hashing.

The share of n-grams of words that two texts have in common is estimated by the share of random
orders of all n-grams in which both have the same first one. A signature has the first n-gram of
each order; it is cut into bands, and texts that agree in all of a band are candidates.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt32, UInt64

from lmjax.config import UserError, config
from lmjax.data.cleaning.units import SPACELESS, has_spaceless

NO_NGRAM = np.uint32(2**32 - 1)  # in the signature of a text without words
_SPACELESS_CLASS = SPACELESS.pattern[1:-1]
TOKEN = re.compile(rf"[{_SPACELESS_CLASS}]|[^\W{_SPACELESS_CLASS}]+")
WORD = re.compile(r"\w+")
BLANKS = {code: " " for code in range(128) if not WORD.match(chr(code))}  # of ASCII, by `translate`
CHUNK = 1 << 15  # n-grams that go through all orders at a time: they stay in the cache


@config
class MinHash:
    """Settings of signatures; those of two runs compare only where all of these are alike."""

    ngram: int = 5  # words of an n-gram; of scripts without spaces, characters
    bands: int = 14  # of a signature
    rows: int = 8  # orders of a band
    seed: int = 1  # of the orders

    def validate(self) -> None:
        """Raises UserError for numbers that make no signature."""
        for name in ("ngram", "bands", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")

    def signatures(self, texts: Sequence[str]) -> UInt32[np.ndarray, "texts orders"]:
        """The signature of each text: the least hash of its n-grams in each order.

        An order is h -> a h + b modulo 2^32 with an odd a. A text of fewer words than an n-gram has
        them all as its only one; without a word all its entries are `NO_NGRAM`.
        """
        hashes, ends = self._hashes(texts)
        orders = self.bands * self.rows
        random = np.random.default_rng(self.seed)
        factors = random.integers(0, 2**32, orders, np.uint32) | np.uint32(1)
        shifts = random.integers(0, 2**32, orders, np.uint32)
        found = np.full((len(texts), orders), NO_NGRAM, np.uint32)
        starts = np.concatenate([[0], ends[:-1]])
        filled = np.flatnonzero(ends > starts)
        first = 0
        while first < len(filled):  # some texts at a time
            last = np.searchsorted(ends[filled], starts[filled[first]] + CHUNK, "right")
            last = max(int(last), first + 1)
            some = filled[first:last]
            begin, end = starts[some[0]], ends[some[-1]]
            part, cuts = hashes[begin:end], starts[some] - begin
            product = np.empty_like(part)
            for order in range(orders):
                np.multiply(part, factors[order], out=product)
                np.add(product, shifts[order], out=product)
                found[some, order] = np.minimum.reduceat(product, cuts)
            first = last
        return found

    def keys(
        self, signatures: UInt32[np.ndarray, "texts orders"]
    ) -> UInt64[np.ndarray, "texts bands"]:
        """A number for each band; texts that agree in all of a band have the same there."""
        bands = signatures.reshape(len(signatures), self.bands, self.rows).astype(np.uint64)
        key = np.full(bands.shape[:2], 0xCBF29CE484222325, np.uint64)
        key ^= np.arange(self.bands, dtype=np.uint64)
        for row in range(self.rows):
            key = _mixed(key ^ bands[:, :, row])
        return key

    def detection(self, similarity: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Probability that texts of a similarity (Jaccard, of n-grams) become candidates."""
        return np.asarray(1 - (1 - similarity**self.rows) ** self.bands)

    def _hashes(
        self, texts: Sequence[str]
    ) -> tuple[UInt32[np.ndarray, "ngrams"], Int[np.ndarray, "texts"]]:
        """Hashes of the n-grams of all texts, one text after another, and where each text ends."""
        known: dict[str, int] = {}
        words, counts = [], np.zeros(len(texts), np.int64)
        for number, text in enumerate(texts):
            own = tokens(text)
            counts[number] = len(own)
            words += own
        for word in set(words):
            known[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        single = np.fromiter(map(known.__getitem__, words), np.uint64, len(words))
        sizes = np.where(counts > 0, np.maximum(counts - self.ngram + 1, 1), 0)
        ends, starts = np.cumsum(sizes), np.cumsum(counts) - counts
        text_of = np.repeat(np.arange(len(texts)), sizes)
        first = np.arange(len(text_of)) - (ends - sizes)[text_of] + starts[text_of]
        length = np.minimum(counts, self.ngram)[text_of]
        combined = np.zeros(len(first), np.uint64)
        for at in range(self.ngram):
            inside = at < length
            word = single[np.where(inside, first + at, 0)] if len(single) else combined
            combined = np.where(inside, _mixed(combined ^ word), combined)
        return (combined >> np.uint64(32)).astype(np.uint32), ends


def tokens(text: str) -> list[str]:
    """Words in lower case without punctuation; of scripts without spaces, characters."""
    text = text.lower()
    if text.isascii():
        return text.translate(BLANKS).split()
    return token_pattern(text).findall(text)


def token_pattern(text: str) -> re.Pattern[str]:
    """The pattern of the words of a text: see `tokens`."""
    return TOKEN if has_spaceless(text) else WORD


def ngrams(text: str, length: int) -> set[tuple[str, ...]]:
    """The n-grams whose shares `MinHash` estimates; of a text of fewer words, these."""
    words = tokens(text)
    count = max(len(words) - length + 1, 1) if words else 0
    return {tuple(words[at : at + length]) for at in range(count)}


def first_of_cluster(keys: UInt64[np.ndarray, "texts bands"]) -> Int[np.ndarray, "texts"]:
    """The first text of each one's cluster: texts that share a key, directly or by others."""
    parent = list(range(len(keys)))

    def root(text: int) -> int:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for one, other in linked(keys):
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(text) for text in range(len(keys))], np.int64)


def linked(keys: UInt64[np.ndarray, "texts bands"]) -> Iterable[tuple[int, int]]:
    """Pairs that link all texts that share a key: each with the next one of the same key."""
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        same = np.flatnonzero(band[order[1:]] == band[order[:-1]])
        yield from zip(order[same].tolist(), order[same + 1].tolist())


def kept(keys: UInt64[np.ndarray, "texts bands"]) -> Bool[np.ndarray, "texts"]:
    """True for the first text of each cluster."""
    return first_of_cluster(keys) == np.arange(len(keys))


def _mixed(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """A bijective hash of 64 bits (the finaliser of MurmurHash3, by A. Appleby)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
