"""Pairs of answers, packed: several in a row, none of which sees another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from lmjax.models.batch import Batch
from lmjax.objectives.example import Example, TokenTargets

SMALLEST = 16  # tokens that a pair has room for at least: so many pairs are in a row at most


def packed_pairs(example: Example, fit_rows: Callable[[int], int]) -> Example:
    """The same pairs of `PreferencePairs` in fewer rows, by best fit.

    A pair has the same row and segment on both sides. Pairs without tokens are left out. The
    example stays as it is where its pairs need as many rows as they have.

    Args:
      example: numpy arrays with one pair a row.
      fit_rows: rows that are needed -> rows that the example gets, at least as many.
    """
    chosen, rejected = example.inputs
    length = chosen.tokens.shape[1]
    sizes = np.maximum(*(np.sum(side.segments > 0, axis=1) for side in (chosen, rejected)))
    most = max(1, length // SMALLEST)
    row, first, slot = best_fit(sizes, length, most)
    rows = fit_rows(int(row.max(initial=0)) + 1)
    if rows >= len(sizes):
        return example
    pairs = np.flatnonzero(sizes)
    index = np.concatenate([np.arange(size) for size in sizes[pairs]])
    pair = np.repeat(pairs, sizes[pairs])
    at = row[pair], first[pair] + index  # of each token of a pair

    def moved(array: np.ndarray) -> np.ndarray:
        found = np.zeros((rows, length), array.dtype)
        found[at] = array[pair, index]
        return found

    def batch(side: Batch) -> Batch:
        segments = moved(side.segments)
        segments[at] *= (slot[pair] + 1).astype(segments.dtype)
        return dataclasses.replace(
            side, tokens=moved(side.tokens), positions=moved(side.positions), segments=segments
        )

    def targets(side: TokenTargets) -> TokenTargets:
        return TokenTargets(moved(side.tokens), moved(side.weights))

    given = example.targets
    reference = given.reference
    if reference is not None:
        reference = np.full((rows, most, 2), np.nan, reference.dtype)
        reference[row[pairs], slot[pairs]] = given.reference[pairs, 0]
    sides = targets(given.chosen), targets(given.rejected)
    return Example((batch(chosen), batch(rejected)), type(given)(*sides, reference, most))


def best_fit(
    sizes: Int[np.ndarray, "pairs"], room: int, most: int
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
    """Row, first token and number in its row of each pair; those of size 0 are at 0.

    The largest comes first, and each into the fullest row that has room.

    Args:
      sizes: of the pairs, none above `room`.
      room: tokens of a row.
      most: pairs of a row.
    """
    left: list[int] = []
    count: list[int] = []
    row, first, slot = (np.zeros(len(sizes), np.int64) for _ in range(3))
    for pair in np.argsort(-sizes, kind="stable"):
        if not (size := int(sizes[pair])):
            continue
        open_rows = [n for n, free in enumerate(left) if free >= size and count[n] < most]
        if not open_rows:
            open_rows = [len(left)]
            left.append(room)
            count.append(0)
        best = min(open_rows, key=lambda n: left[n])
        row[pair], first[pair], slot[pair] = best, room - left[best], count[best]
        left[best] -= size
        count[best] += 1
    return row, first, slot
