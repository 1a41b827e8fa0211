"""Agreement of two judges beyond chance: Cohen's kappa and its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

NORMAL = 1.959963984540054  # of a normal distribution, 95 percent lie within so many deviations


def cohens_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Cohen's kappa of two annotators' labels of the same cases.

    (p - e) / (1 - e), where p is the share of equal labels, and e the share to expect of annotators
    who draw their labels at random, each as often as it has them (Cohen 1960).

    Returns:
      At most 1; 0 for chance; NaN where e is 1 or there is no case.
    """
    count = len(one)
    counts, others = Counter(one), Counter(other)
    expected = sum(counts[label] * others[label] for label in counts)  # times count^2
    if expected == count**2:
        return math.nan
    equal = sum(a == b for a, b in zip(one, other, strict=True))
    return (equal * count - expected) / (count**2 - expected)


def kappa_interval(one: Sequence[Hashable], other: Sequence[Hashable]) -> tuple[float, float]:
    """Ends of the interval that has Cohen's kappa with a probability of 95 percent.

    By its standard error for large numbers of cases (Fleiss, Cohen and Everitt 1969, formula 13).

    Returns:
      From -1 to 1; NaN where there is no kappa.
    """
    kappa, count = cohens_kappa(one, other), len(one)
    if math.isnan(kappa):
        return math.nan, math.nan
    pairs = Counter(zip(one, other, strict=True))
    rows, columns = Counter(one), Counter(other)
    expected = sum(rows[label] * columns[label] for label in rows) / count**2
    total = 0.0
    for (a, b), number in pairs.items():
        if a == b:
            part = 1 - (rows[a] + columns[a]) / count * (1 - kappa)
        else:
            part = (1 - kappa) * (columns[a] + rows[b]) / count
        total += number / count * part**2
    variance = (total - (kappa - expected * (1 - kappa)) ** 2) / (count * (1 - expected) ** 2)
    reach = NORMAL * math.sqrt(max(variance, 0.0))
    return max(kappa - reach, -1.0), min(kappa + reach, 1.0)


def share_interval(number: int, count: int) -> tuple[float, float]:
    """Ends of the interval that has a share with a probability of 95 percent (Wilson 1927).

    Args:
      number: cases for which it holds.
      count: of all cases; of none it is from 0 to 1.
    """
    if not count:
        return 0.0, 1.0
    share, square = number / count, NORMAL**2
    center = (share + square / (2 * count)) / (1 + square / count)
    spread = share * (1 - share) / count + square / (4 * count**2)
    reach = NORMAL * math.sqrt(spread) / (1 + square / count)
    return max(center - reach, 0.0), min(center + reach, 1.0)
