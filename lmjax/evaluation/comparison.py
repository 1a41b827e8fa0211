"""Two models on the same items: how far apart they are, and how sure that is.

    difference = paired_bootstrap(scores, others)
    difference.value, difference.low, difference.high, difference.p

The items of a test are the same for both, and hard ones are hard for both, so that scores are
compared item by item: two intervals that overlap say little.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lmjax.config import UserError

LEVEL = 0.95
RESAMPLES = 2000
DRAWN = 1 << 22  # most numbers of a matrix of draws
NORMAL = statistics.NormalDist()
Rows = Float[np.ndarray, "items ..."] | Int[np.ndarray, "items ..."] | Bool[np.ndarray, "items ..."]
Statistic = Callable[[np.ndarray], float]
# Of many sums of rows, and the number of items in each of them.
OfSums = Callable[[np.ndarray, int], np.ndarray]


class Interval(NamedTuple):
    """A number and its confidence interval.

    Attributes:
      value: the estimate.
      low, high: ends of the interval.
    """

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Difference of two models, ours less theirs.

    Attributes:
      value: the estimate.
      low, high: ends of its confidence interval.
      p: chance of a difference as large, either way, if both models were as good.
    """

    value: float
    low: float
    high: float
    p: float


def wilson_interval(share: float, count: float | int, level: float = LEVEL) -> Interval:
    """Interval of a share of so many independent cases (Wilson 1927).

    Unlike the share plus or minus two standard errors it covers shares near 0 and 1 too, and stays
    between them.

    Raises:
      UserError: there is no case, or the share is none.
    """
    if not (count > 0 and 0 <= share <= 1):
        raise UserError(f"an interval of the share {share} of {count} cases: there is none")
    z = _quantile(level)
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # Of all or no cases, rounding would put the end of the interval beyond the share.
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    return Interval(share, min(low, share), max(high, share))


def mean_interval(values: Float[np.ndarray, "items"], level: float = LEVEL) -> Interval:
    """Interval of a mean by Student's t; of values that are 0 or 1, Wilson's.

    Raises:
      UserError: a value is not finite, or there is none, or one other than 0 or 1.
    """
    _require_finite("the mean", values)
    mean, count = float(np.mean(values)), len(values)
    if np.isin(values, (0, 1)).all():
        return wilson_interval(mean, count, level)
    if count < 2:
        raise UserError("an interval of one value: give more")
    from scipy.special import stdtrit  # jax brings it

    spread = stdtrit(count - 1, (1 + level) / 2) * np.std(values, ddof=1) / math.sqrt(count)
    return Interval(mean, float(mean - spread), float(mean + spread))


def bootstrap_interval(
    rows: Rows,
    statistic: Statistic | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Interval of any function of sums over items, by drawing items anew (Efron 1979).

    It is the interval BCa (Efron 1987), whose ends are corrected for bias and skew: of scores near
    their limits, and of ratios, the percentiles themselves lie too far to one side. Items that all
    have the same score have an interval without width, however few: draws show nothing that the
    items do not have (`wilson_interval` does).

    Args:
      rows: of each item; a number, or all that is summed up, such as `bleu_counts`.
      statistic: function of the sum of rows; None is the mean of numbers.
      resamples: draws of as many items as there are.
      seed: of the draws.
      level: share of such intervals that have the true number in them.

    Raises:
      UserError: fewer than two items, or a row that is not finite.
    """
    rows = np.asarray(rows, np.float64)
    return _bootstrap(rows, _of_sums(statistic), resamples, seed, level)


def _of_sums(statistic: Statistic | None) -> OfSums:
    """A statistic, or the mean, of many sums at once."""
    if statistic is None:
        return lambda totals, count: totals / count
    return lambda totals, count: np.array([statistic(total) for total in totals])


def _bootstrap(
    rows: Float[np.ndarray, "items ..."], evaluate: OfSums, resamples: int, seed: int, level: float
) -> Interval:
    _require_finite("the bootstrap", rows)
    count, total = len(rows), rows.sum(axis=0)
    if count < 2:
        raise UserError("bootstrap: give two items or more")
    value, random = float(evaluate(total[None], count)[0]), np.random.default_rng(seed)
    drawn = []
    for size in _sizes(resamples, count):
        times = random.multinomial(count, np.full(count, 1 / count), size)  # that an item is drawn
        drawn.append(evaluate(np.tensordot(times, rows, 1), count))
    drawn = np.concatenate(drawn)
    left = evaluate(total - rows, count - 1)
    return Interval(value, *_bca(value, np.sort(drawn), left, level))


def _bca(
    value: float, drawn: Float[np.ndarray, "draws"], left: Float[np.ndarray, "items"], level: float
) -> tuple[float, float]:
    """Ends of the interval, of sorted draws and of the values without each item."""
    below = (np.mean(drawn < value) + np.mean(drawn <= value)) / 2
    apart = left.mean() - left
    spread = np.sum(apart**2) ** 1.5
    if not spread or not 0 < below < 1:
        return float(drawn[0]), float(drawn[-1])
    bias, skew = NORMAL.inv_cdf(below), float(np.sum(apart**3) / (6 * spread))
    ends = []
    for z in (-_quantile(level), _quantile(level)):
        shifted = bias + z
        ends.append(NORMAL.cdf(bias + shifted / (1 - skew * shifted)))
    low, high = np.quantile(drawn, ends)
    return float(low), float(high)


def paired_bootstrap(
    ours: Rows,
    theirs: Rows,
    statistic: Statistic | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Difference:
    """Difference of two models over the same items.

    Its interval is `bootstrap_interval`'s, its p that of the randomization test: scores of an item
    are swapped between the models at random, as they might be if the models did not differ (Noreen
    1989; for BLEU Riezler and Maxwell 2005).

    Args:
      ours: of each item; see `bootstrap_interval`.
      theirs: of the same items.
      statistic, resamples, seed, level: see `bootstrap_interval`.

    Raises:
      UserError: other items than the other model's; see `bootstrap_interval`.
    """
    ours, theirs = (np.asarray(rows, np.float64) for rows in (ours, theirs))
    if ours.shape != theirs.shape:
        raise UserError(
            f"a comparison of {ours.shape} with {theirs.shape} scores: give those of the same items"
        )
    count, evaluate = len(ours), _of_sums(statistic)

    def apart(totals: np.ndarray, items: int) -> np.ndarray:
        return evaluate(totals[:, 0], items) - evaluate(totals[:, 1], items)

    both = np.stack([ours, theirs], axis=1)
    found = _bootstrap(both, apart, resamples, seed, level)
    random, beyond = np.random.default_rng([seed, 1]), 1
    middle, half = both.sum(axis=0).mean(axis=0), (ours - theirs) / 2
    least = abs(found.value) - 1e-12 * (1 + abs(found.value))  # of equal ones, by another rounding
    for size in _sizes(resamples, count):
        signs = random.integers(0, 2, (size, count)) * 2.0 - 1
        swapped = np.tensordot(signs, half, 1)
        others = apart(np.stack([middle + swapped, middle - swapped], axis=1), count)
        beyond += int(np.sum(np.abs(others) >= least))
    return Difference(*found, beyond / (resamples + 1))


class McNemar(NamedTuple):
    """Items of which one model alone is right.

    Attributes:
      ours: items of which only ours is.
      theirs: items of which only the other is.
      p: chance that such items are shared out as unevenly, or more, if both were as good.
    """

    ours: int
    theirs: int
    p: float


def mcnemar(ours: Bool[np.ndarray, "items"], theirs: Bool[np.ndarray, "items"]) -> McNemar:
    """Exact test of two models' right answers to the same questions (McNemar 1947).

    Twice the tail of the binomial distribution, at most 1, in whole numbers: exact for any count.

    Raises:
      UserError: answers to other questions than the other model's.
    """
    if ours.shape != theirs.shape:
        raise UserError(f"a comparison of {len(ours)} answers with {len(theirs)}")
    only, other = int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))
    count = only + other
    tail = ways = 1
    for n in range(1, min(only, other) + 1):
        ways = ways * (count - n + 1) // n
        tail += ways
    return McNemar(only, other, min(1.0, 2 * tail / 2**count))


def score_ratio(
    scores: Float[np.ndarray, "items"],
    references: Float[np.ndarray, "items"],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Sum of a model's scores, such as a judge's, over that of a reference model on the same items.

    OpenChat's 105.7% of ChatGPT is such a ratio (Wang et al. 2023, arXiv:2309.11235).

    Raises:
      UserError: not as many scores, or references whose sum is not above 0; see
        `bootstrap_interval`.
    """
    if len(scores) != len(references) or not np.sum(references) > 0:
        raise UserError(
            f"a ratio of {len(scores)} scores to {len(references)} with the sum"
            f" {np.sum(references)}: give as many, with a sum above 0"
        )
    rows = np.stack([scores, references], axis=1)
    return bootstrap_interval(rows, lambda total: total[0] / total[1], resamples, seed, level)


def _quantile(level: float) -> float:
    return NORMAL.inv_cdf((1 + level) / 2)


def _sizes(draws: int, items: int) -> Iterator[int]:
    most = max(1, DRAWN // items)
    for start in range(0, draws, most):
        yield min(most, draws - start)


def _require_finite(what: str, values: np.ndarray) -> None:
    if not len(values):
        raise UserError(f"{what} of no items")
    wrong = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if wrong.any():
        number = int(np.argmax(wrong))
        raise UserError(f"{what} of {len(values)} items: item {number} has {values[number]}")
