"""Comparison of two models by judgements, or scores, of their replies to the same requests."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

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
    """Judgements of a model's replies beside another one's, each pair shown in both orders.

    Attributes:
      rate: wins and half of the ties, with its interval.
      wins, losses, ties: requests.
      missing: requests without any judgement, which count for nothing.
      agreement: share of the requests judged in both orders whose judgements are the same.
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
    outcomes: Float[np.ndarray, "requests orders"], rule: Rule = "agree", level: float = LEVEL
) -> JudgedWins:
    """Win rate of judgements.

    Args:
      outcomes: 1 where the model's reply is judged to be better, 0 where the other's is, 0.5 for a
        tie, NaN for no judgement; first those with the model's reply in front, then, if there are
        any, those with the replies swapped.
      rule: `agree`: a request is won, or lost, if both judgements say so, and else a tie (Zheng et
        al. 2023, arXiv:2306.05685, section 3.4); `mean`: the mean of its judgements.
      level: of the interval, over requests: the two judgements of one are not two cases.

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
    both = there.all(axis=1) & (outcomes.shape[1] > 1)
    same = float(np.mean(outcomes[both].min(axis=1) == outcomes[both].max(axis=1)))
    for_first = np.where(np.arange(outcomes.shape[1]) == 0, outcomes, 1 - outcomes)
    return JudgedWins(
        score_share(scores, level),
        int(np.sum(scores > 0.5)),
        int(np.sum(scores < 0.5)),
        int(np.sum(scores == 0.5)),
        int(np.sum(~judged)),
        same if both.any() else float("nan"),
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
