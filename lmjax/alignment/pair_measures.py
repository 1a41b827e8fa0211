"""Measures of scores on pairs of compared answers: by margin, calibration, what length explains."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lmjax.alignment.comparison_accuracy import pairs_of
from lmjax.alignment.comparison_rows import MARGIN, RANK
from lmjax.data.store import TokenStore

BINS = 5  # of the probabilities from 0.5 to 1
MOST = 8  # different margins that are told apart; more are put into as many groups of equal size


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """Pairs of a better and a worse answer to one request.

    Attributes:
      lead: score of the better one less that of the worse one.
      longer: tokens of the better one less those of the worse one.
      margin: by which the better one should win; without margins in the data, by how many ranks it
        is better.
    """

    lead: Float[np.ndarray, "pairs"]
    longer: Float[np.ndarray, "pairs"]
    margin: Float[np.ndarray, "pairs"]

    @classmethod
    def of(cls, store: TokenStore, scores: Float[np.ndarray, "documents"]) -> ScoredPairs:
        """All pairs of a store of which both answers have a score (not NaN)."""
        better, worse = (np.concatenate(side) for side in zip(*pairs_of(store), strict=True))
        is_scored = ~np.isnan(scores[better] + scores[worse])
        better, worse = better[is_scored], worse[is_scored]
        sizes, labels = np.diff(store.offsets).astype(np.float64), store.labels
        margin = labels[better, MARGIN]
        if not labels[:, MARGIN].any():
            margin = labels[worse, RANK] - labels[better, RANK]
        lead = scores[better].astype(np.float64) - scores[worse]
        return cls(lead, sizes[better] - sizes[worse], margin.astype(np.float64))

    def __len__(self) -> int:
        return len(self.lead)

    def where(self, chosen: Bool[np.ndarray, "pairs"]) -> ScoredPairs:
        """Some of the pairs."""
        return ScoredPairs(self.lead[chosen], self.longer[chosen], self.margin[chosen])

    @property
    def accuracy(self) -> float:
        """Share of the pairs in which the better one has the higher score; equal ones are half."""
        return won(self.lead)


class Bin(NamedTuple):
    """Pairs of about one predicted probability.

    Attributes:
      low, high: bounds of the probability that the answer with the higher score is better.
      share: of all pairs.
      predicted: mean of that probability.
      agreement: share of the bin's pairs in which that answer is better.
    """

    low: float
    high: float
    share: float
    predicted: float
    agreement: float


def won(lead: Float[np.ndarray, "pairs"]) -> float:
    """Share of leads above 0, with half of those that are 0; NaN where there are none."""
    return float(np.mean(np.heaviside(lead, 0.5))) if len(lead) else float("nan")


def by_margin(pairs: ScoredPairs) -> list[tuple[float, ScoredPairs]]:
    """The pairs of each margin, rising; of many margins, groups of equal size by their mean."""
    values = np.unique(pairs.margin)
    if len(values) <= MOST:
        return [(float(value), pairs.where(pairs.margin == value)) for value in values]
    edges = np.quantile(pairs.margin, np.linspace(0, 1, MOST + 1)[1:-1])
    group = np.searchsorted(edges, pairs.margin, side="right")
    parts = [pairs.where(group == number) for number in range(MOST)]
    return [(float(part.margin.mean()), part) for part in parts if len(part)]


def calibration(pairs: ScoredPairs) -> list[Bin]:
    """Predicted probabilities beside agreement with the labels, in bins of equal width.

    The probability that the answer with the higher score is better is the sigmoid of its lead
    (Bradley and Terry 1952), from 0.5 on.
    """
    probability = 1 / (1 + np.exp(-np.abs(pairs.lead)))
    agrees = np.heaviside(pairs.lead, 0.5)
    edges = np.linspace(0.5, 1, BINS + 1)
    number = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, BINS - 1)
    found = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        here = number == index
        if here.any():
            means = float(probability[here].mean()), float(agrees[here].mean())
            found.append(Bin(float(low), float(high), float(here.mean()), *means))
    return found


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: mean distance of prediction and agreement over the pairs.

    Guo et al. 2017 (arXiv:1706.04599, eq. 3).
    """
    return sum(one.share * abs(one.predicted - one.agreement) for one in bins)


def variance_by_length(pairs: ScoredPairs) -> float:
    """Share of the squared leads that the difference of lengths explains, 0 to 1.

    That of the least squares fit of the lead by a number times the difference, without a constant:
    which of two answers comes first does not matter. NaN where lengths or scores do not differ.
    """
    total = np.sum(np.square(pairs.lead)) * np.sum(np.square(pairs.longer))
    both = np.sum(pairs.lead * pairs.longer)
    return float(np.square(both) / total) if total > 0 else float("nan")
