"""Shares of a text that repeat what the text has said before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from lmjax.data.cleaning.units import Words


def repeated_items(items: Sequence[str]) -> tuple[float, float]:
    """Shares of items that occurred before: of their number, and of their characters."""
    if not items:
        return 0.0, 0.0
    counts = Counter(items)
    again = [(item, count - 1) for item, count in counts.items() if count > 1]
    characters = sum(map(len, items))
    repeated = sum(len(item) * count for item, count in again)
    return sum(count for _, count in again) / len(items), repeated / max(characters, 1)


def ngram_numbers(words: Sequence[str], longest: int) -> Iterator[Int[np.ndarray, "ngrams"]]:
    """A number for each n-gram of words, equal for equal ones, for n = 1, 2, ..., `longest`.

    Exact: an n-gram is numbered as a pair of an (n-1)-gram and a word. Ends with the first n for
    which no n-gram occurs twice, since then no longer one does.
    """
    known = {word: number for number, word in enumerate(dict.fromkeys(words))}
    single = np.fromiter(map(known.__getitem__, words), np.int64, len(words))
    numbers = single
    for n in range(1, longest + 1):
        if n > 1:
            if len(numbers) < 2:
                return
            pairs = numbers[:-1] * len(known) + single[n - 1 :]
            values, numbers = np.unique(pairs, return_inverse=True)
            if len(values) == len(numbers):
                yield numbers
                return
        yield numbers


def most_frequent(words: Words, numbers: Int[np.ndarray, "ngrams"], length: int) -> float:
    """Share of a text's characters in the n-gram that occurs most often, if it does so twice.

    Of several that occur equally often the one with the most characters counts.

    Args:
        words: of the text.
        numbers: of its n-grams.
        length: of the text, in characters.
    """
    n = len(words.texts) - len(numbers) + 1
    counts = np.bincount(numbers)
    if not counts.size or counts.max() < 2:
        return 0.0
    sizes = words.ends[n - 1 :] - words.starts[: len(numbers)]
    most = counts[numbers] == counts.max()
    totals = np.bincount(numbers[most], weights=sizes[most])
    return float(totals.max() / length)


def in_repeated_ngrams(words: Words, numbers: Int[np.ndarray, "ngrams"], length: int) -> float:
    """Share of a text's characters in n-grams that occurred before, each counted once."""
    n = len(words.texts) - len(numbers) + 1
    _, first = np.unique(numbers, return_index=True)
    again = np.ones(len(numbers), bool)
    again[first] = False
    at = np.flatnonzero(again)
    if not at.size:
        return 0.0
    starts, ends = words.starts[at], words.ends[at + n - 1]
    covered = np.maximum.accumulate(np.concatenate([[0], ends[:-1]]))
    return float(np.maximum(ends - np.maximum(starts, covered), 0).sum() / length)
