"""Comparison of two models by judgements, or scores, of their replies to the same requests."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lmjax.config import UserError
from lmjax.evaluation.comparison import LEVEL, Interval, wilson_interval

Rule = Literal["agree", "mean"]


class WinRate(NamedTuple):
    """Share of requests that a model wins, and the 95% interval of the share.

    Attributes:
      rate: wins and half of the ties, of all requests.
      low, high: ends of the interval.
    """

    rate: float
    low: float
    high: float


def win_rate(
    scores: Float[np.ndarray, "requests"], others: Float[np.ndarray, "requests"]
) -> WinRate:
    """Win rate of a model over another one.

    The interval is Wilson's score interval (1927). A tie counts as half a win and varies less than
    wins and losses do, so that with ties the interval is wider than it need be; see `judged_wins`.

    Args:
      scores: of the model's replies.
      others: of the other model's replies to the same requests.

    Raises:
      UserError: there is no request, or a score is not finite.
    """
    if not len(scores) or not (np.isfinite(scores).all() and np.isfinite(others).all()):
        raise UserError(f"a win rate needs finite scores of one request or more, not {scores}")
    rate = float(np.mean(scores > others) + 0.5 * np.mean(scores == others))
    return WinRate(*wilson_interval(rate, len(scores)))


class JudgedWins(NamedTuple):
    """Judgements of a model's replies beside another one's.

    Attributes:
      rate: wins and half of the ties, with its interval.
      wins, losses, ties: requests.
      missing: requests without any judgement, which count for nothing.
      agreement: share of the requests with several judgements of which all are the same.
      first: share of judgements for the reply that is shown first, ties half; 0.5 for a judge whom
        the order does not lead.
    """

    rate: Interval
    wins: int
    losses: int
    ties: int
    missing: int
    agreement: float
    first: float


def judged_wins(
    outcomes: Float[np.ndarray, "requests judgements"],
    rule: Rule = "agree",
    level: float = LEVEL,
    in_front: Bool[np.ndarray, "requests judgements"] | None = None,
) -> JudgedWins:
    """Win rate of judgements.

    Args:
      outcomes: 1 where the model's reply is judged to be better, 0 where the other's is, 0.5 for a
        tie, NaN for no judgement; of a judge in both orders, or of several people.
      rule: `agree`: a request is won, or lost, if all its judgements say so, and else a tie (Zheng
        et al. 2023, arXiv:2306.05685, section 3.4); `mean`: the mean of its judgements.
      level: of the interval, over requests: two judgements of one are not two cases.
      in_front: whether the model's reply was shown first; None: for the first judgement of each
        request, and not for the others.

    Raises:
      UserError: no request is judged, or an outcome is none.
    """
    outcomes = np.asarray(outcomes, np.float64)
    if not np.isin(outcomes[~np.isnan(outcomes)], (0, 0.5, 1)).all():
        raise UserError("outcomes are 1, 0.5 and 0 for won, tied and lost, and NaN for none")
    there = ~np.isnan(outcomes)
    judged = there.any(axis=1)
    if not judged.any():
        raise UserError(f"there is no judgement of any of {len(outcomes)} requests")
    least, most = np.nanmin(outcomes[judged], axis=1), np.nanmax(outcomes[judged], axis=1)
    scores = np.nanmean(outcomes[judged], axis=1)
    if rule == "agree":
        scores = np.where(least == most, least, 0.5)
    several = there[judged].sum(axis=1) > 1
    if in_front is None:
        in_front = np.broadcast_to(np.arange(outcomes.shape[1]) == 0, outcomes.shape)
    for_first = np.where(in_front, outcomes, 1 - outcomes)
    return JudgedWins(
        score_share(scores, level),
        int(np.sum(scores > 0.5)),
        int(np.sum(scores < 0.5)),
        int(np.sum(scores == 0.5)),
        int(np.sum(~judged)),
        float(np.mean((least == most)[several])) if several.any() else float("nan"),
        float(np.nanmean(for_first)),
    )


def score_share(scores: Float[np.ndarray, "items"], level: float = LEVEL) -> Interval:
    """Mean of scores from 0 to 1, such as wins with ties, with its interval.

    Wilson's, of as many cases as would vary so little were they all won or lost; the variance is
    that of the scores and of a win and a loss more, so that ties alone do not look certain.
    """
    mean, count = float(np.mean(scores)), len(scores)
    variance = (np.sum((scores - mean) ** 2) + 0.5) / (count + 2)
    cases = count * max(1.0, mean * (1 - mean) / variance)
    return wilson_interval(mean, cases, level)
