"""Pairs of answers, packed: several in a row, none of which sees another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lmjax.alignment.row_packing import RowPacking, best_fit
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
    packing = RowPacking(sizes, row, first, slot, rows, length)

    def targets(side: TokenTargets) -> TokenTargets:
        return TokenTargets(packing.pack(side.tokens), packing.pack(side.weights))

    given, pairs = example.targets, np.flatnonzero(sizes)
    reference = given.reference
    if reference is not None:
        reference = np.full((rows, most, 2), np.nan, reference.dtype)
        reference[row[pairs], slot[pairs]] = given.reference[pairs, 0]
    sides = targets(given.chosen), targets(given.rejected)
    batches = packing.pack_batch(chosen), packing.pack_batch(rejected)
    return Example(batches, type(given)(*sides, reference, most))
