"""Errors of MinHash: how likely are two texts of a similarity to be found?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from lmjax.console import Table
from lmjax.data.cleaning.clusters import NearDuplicates
from lmjax.data.cleaning.near_duplicates import MinHash

POINTS = 51  # of a curve
FINE = 2001  # of the sums
SHARES = (0.05, 0.5, 0.95)  # of pairs that are found, whose similarities are told


def curve_tables(steps: Sequence[object]) -> Iterator[Table]:
    """A curve for each different MinHash of some steps, as tables with a picture."""
    found = dict.fromkeys(step.minhash for step in steps if isinstance(step, NearDuplicates))
    for minhash in found:
        similarity = max(
            s.similarity for s in steps if isinstance(s, NearDuplicates) and s.minhash == minhash
        )
        title = f"MinHash, {minhash.bands} bands of {minhash.rows}"
        yield curve_table(minhash, similarity, title)


def curve_table(minhash: MinHash, similarity: float = 0.0, title: str = "MinHash") -> Table:
    """The share of pairs that become candidates by their similarity (Jaccard, of n-grams).

    1 - (1 - s^rows)^bands (Leskovec et al. 2014, Mining of Massive Datasets, section 3.4).

    Args:
        minhash: the settings.
        similarity: from which on pairs are wanted; 0: from where half of them are found.
        title: of the table.
    """
    wanted = similarity or similarity_found(minhash, 0.5)
    at = np.linspace(0, 1, POINTS)
    rows = tuple(
        (f"{s:.2f}", float(p), float(s >= wanted))
        for s, p in zip(at, minhash.detection(at), strict=True)
    )
    notes = [
        f"{share:.0%} of the pairs are found at a similarity of "
        f"{similarity_found(minhash, share):.3f}."
        for share in SHARES
    ]
    above, below = error_areas(minhash, wanted)
    notes.append(
        f"For pairs of {wanted:.3f} or more, were all similarities as frequent: {above:.4f} are "
        f"missed, and {below:.4f} are candidates though less similar."
    )
    columns = ("similarity", "found", "wanted")
    caption = "Share of pairs that share a band, by the similarity of their n-grams."
    return Table(title, columns, rows, caption, notes=tuple(notes), picture="lines")


def similarity_found(minhash: MinHash, share: float) -> float:
    """The similarity at which so large a share of pairs become candidates."""
    return float((1 - (1 - share) ** (1 / minhash.bands)) ** (1 / minhash.rows))


def error_areas(minhash: MinHash, wanted: float) -> tuple[float, float]:
    """Shares of all pairs that are missed, and found in vain, were all similarities as frequent.

    The areas over and under the curve on both sides of `wanted`, by the rule of trapezoids.
    """

    def area(low: float, high: float, values: Float[np.ndarray, "points"]) -> float:
        return float(np.trapezoid(values, dx=(high - low) / (FINE - 1)))

    above, below = np.linspace(wanted, 1, FINE), np.linspace(0, wanted, FINE)
    missed = area(wanted, 1.0, 1 - minhash.detection(above))
    return missed, area(0.0, wanted, minhash.detection(below))
