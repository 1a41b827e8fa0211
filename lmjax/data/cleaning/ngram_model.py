"""Language models of n-grams of tokens, smoothed by Kneser and Ney's rule.

The interpolated form with one discount an order (Chen and Goodman 1999, section 3): the probability
of a token after a context is its discounted share of the context, and what was taken off goes to
the next shorter context. All but the longest n-grams count by the number of tokens that they
follow, not by their own number. CCNet (Wenzek et al. 2020, arXiv:1911.00359, section 4.2) orders
pages by such a model of 5-grams. N-grams are kept as hashes of 64 bits.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt64

from lmjax.config import UserError
from lmjax.files import errors_told

FORMAT = 1  # of the file
BEGIN = 0  # in place of a token, before a text; tokens count from 1 inside of this file
Hashes = UInt64[np.ndarray, "_"]


class Order(NamedTuple):
    """N-grams of one length.

    Attributes:
        ngrams: their hashes, rising.
        logs: natural logarithm of the probability of each one's last token after the others.
        contexts: hashes of n-grams that are shorter by one, rising.
        rests: natural logarithm of what each leaves to the next shorter context.
    """

    ngrams: Hashes
    logs: Float32[np.ndarray, "_"]
    contexts: Hashes
    rests: Float32[np.ndarray, "_"]


class NgramModel(NamedTuple):
    """Probabilities of tokens after those before them.

    Attributes:
        orders: of n-grams of 1, 2, ... tokens.
        unknown: natural logarithm of the probability of a token that was never seen.
        quantiles: perplexities of the documents that it was compared with, from the least to the
            largest in equal steps of their number; empty: of none.
    """

    orders: tuple[Order, ...]
    unknown: float
    quantiles: Float[np.ndarray, "_"] = np.zeros(0)

    def log_probabilities(self, tokens: Sequence[int]) -> Float[np.ndarray, "tokens"]:
        """Natural logarithm of each token's probability after those before it in the text."""
        hashes = _all_hashes(_framed(tokens), len(self.orders))
        found = np.zeros(len(tokens))
        left = np.arange(1, len(tokens) + 1)  # positions of those that are not yet found
        for length in range(len(self.orders), 0, -1):
            order = self.orders[length - 1]
            fits = left >= length - 1
            at = left[fits] - length + 1
            here, known = _find(order.ngrams, hashes[length - 1][at])
            found[left[fits][known] - 1] += order.logs[here[known]]
            if length > 1:
                where, follows = _find(order.contexts, hashes[length - 2][at])
                rests = np.where(follows, order.rests[where], 0.0) if len(order.rests) else 0.0
                found[left[fits][~known] - 1] += np.broadcast_to(rests, at.shape)[~known]
            keep = np.ones(len(left), bool)
            keep[np.flatnonzero(fits)[known]] = False
            left = left[keep]
        found[left - 1] += self.unknown
        return found

    def perplexity(self, tokens: Sequence[int]) -> float:
        """Perplexity of a token; infinite for a text without any."""
        if not len(tokens):
            return float("inf")
        return float(np.exp(-self.log_probabilities(tokens).mean()))

    def quantile(self, perplexity: float) -> float:
        """Share of the compared documents with a lower perplexity, from 0 to 1."""
        if not len(self.quantiles):
            return 0.0
        shares = np.linspace(0, 1, len(self.quantiles))
        return float(np.interp(perplexity, self.quantiles, shares))

    def save(self, path: pathlib.Path) -> None:
        """Writes the model. UserError: it cannot be written."""
        arrays = {
            f"{name}{length}": array
            for length, order in enumerate(self.orders, start=1)
            for name, array in order._asdict().items()
        }
        about = {"format": FORMAT, "orders": len(self.orders), "unknown": self.unknown}
        with errors_told(f"cannot write {path}"):
            np.savez(path, quantiles=self.quantiles, **about, **arrays)


def load_ngrams(path: pathlib.Path) -> NgramModel:
    """Reads a model that `NgramModel.save` wrote. UserError: it is none."""
    with errors_told(f"cannot read {path}"):
        try:
            with np.load(path, allow_pickle=False) as found:
                if int(found["format"]) != FORMAT:
                    raise ValueError(f"format {found['format']}")
                orders = tuple(
                    Order(*(found[f"{name}{length}"] for name in Order._fields))
                    for length in range(1, int(found["orders"]) + 1)
                )
                return NgramModel(orders, float(found["unknown"]), found["quantiles"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is no model of n-grams: {error}") from None


def train_ngrams(
    texts: Iterable[Sequence[int]], vocab_size: int, order: int = 5, least: int = 1
) -> NgramModel:
    """Counts n-grams and smooths their shares.

    Args:
        texts: tokens of each.
        vocab_size: different tokens that there may be.
        order: tokens of the longest n-grams.
        least: times that an n-gram of three or more tokens occurs in order to count.

    Raises:
        UserError: there is no token, or no order.
    """
    if order < 1 or least < 1:
        raise UserError(f"order={order}, least={least}: must be 1 or more")
    framed = [_framed(text) for text in texts]
    if not sum(len(text) - 1 for text in framed):
        raise UserError("there is no text to count n-grams of")
    words = np.concatenate(framed)
    # First token of the text that each one belongs to: n-grams do not cross it.
    starts = np.repeat(
        np.cumsum([0, *map(len, framed[:-1])]), np.array([len(text) for text in framed])
    )
    hashes, counted = _all_hashes(words, order), []
    for length in range(1, order + 1):
        counted.append(_counts(words, starts, hashes, length, length == order, least))
    orders: list[Order] = []
    uniform, unknown = 1 / vocab_size, 0.0
    lower: dict[str, np.ndarray] = {}
    for length, (at, counts) in enumerate(counted, start=1):
        grams, contexts = hashes[length - 1][at], _context_hashes(hashes, at, length)
        discount = _discount(counts)
        names, which = np.unique(contexts, return_inverse=True)
        totals = np.bincount(which, weights=counts)
        rests = discount * np.bincount(which) / totals
        if length == 1:
            below = np.full(len(at), uniform)
        else:
            where, known = _find(lower["grams"], hashes[length - 2][at + 1])
            below = np.where(known, lower["p"][where], unknown)
        p = (counts - discount) / totals[which] + rests[which] * below
        if length == 1:
            unknown = float(rests[0] * uniform)
        sort = np.argsort(grams)
        lower = {"grams": grams[sort], "p": p[sort]}
        logs = np.log(p[sort]).astype(np.float32)
        orders.append(Order(grams[sort], logs, names, np.log(rests).astype(np.float32)))
    return NgramModel(tuple(orders), float(np.log(unknown)))


def _counts(
    words: Int[np.ndarray, "words"],
    starts: Int[np.ndarray, "words"],
    hashes: list[Hashes],
    length: int,
    longest: bool,
    least: int,
) -> tuple[Int[np.ndarray, "ngrams"], Int[np.ndarray, "ngrams"]]:
    """Position and count of each different n-gram; see the head of this file."""
    at = np.arange(len(words) - length + 1)
    at = at[starts[at] == starts[at + length - 1]]
    at = at[words[at + length - 1] != BEGIN]  # which is never predicted
    _, first, raw = np.unique(hashes[length - 1][at], return_index=True, return_counts=True)
    position = at[first]
    if longest:
        counts = raw
    else:
        before = at[words[at] != BEGIN] - 1  # of the n-grams that are longer by one to the left
        _, distinct = np.unique(hashes[length][before], return_index=True)
        names, times = np.unique(hashes[length - 1][before[distinct] + 1], return_counts=True)
        where, known = _find(names, hashes[length - 1][position])
        counts = np.where(known, times[where], raw) if len(names) else raw
    kept = raw >= (least if length > 2 else 1)
    return position[kept], counts[kept]


def _discount(counts: Int[np.ndarray, "ngrams"]) -> float:
    """The share of a count that is taken off: n1 / (n1 + 2 n2), of those that occur once, twice."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


def _context_hashes(hashes: list[Hashes], at: np.ndarray, length: int) -> Hashes:
    return np.zeros(len(at), np.uint64) if length == 1 else hashes[length - 2][at]


def _framed(tokens: Sequence[int]) -> Int[np.ndarray, "words"]:
    """Tokens, from 1 on, after what stands for the beginning."""
    return np.concatenate([[BEGIN], np.asarray(tokens, np.int64) + 1]).astype(np.int64)


def _all_hashes(words: Int[np.ndarray, "words"], longest: int) -> list[Hashes]:
    """For each length the hash of the n-gram that begins at each word; near the end of no use."""
    own = (words.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    found = [_mixed(own)]
    for length in range(2, longest + 1):
        shifted = np.zeros_like(own)
        shifted[: max(len(own) - length + 1, 0)] = own[length - 1 :]
        found.append(_mixed((found[-1] ^ shifted) + np.uint64(length)))
    return found


def _mixed(x: Hashes) -> Hashes:
    """A bijective hash of 64 bits (SplitMix64's finaliser, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _find(known: Hashes, wanted: Hashes) -> tuple[np.ndarray, np.ndarray]:
    """Indices into rising hashes, and whether each one is there; an index of 0 where it is not."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    at = np.searchsorted(known, wanted)
    at[at == len(known)] = 0
    return at, known[at] == wanted
