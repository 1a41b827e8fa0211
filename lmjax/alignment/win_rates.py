"""Comparison of two models by the scores of their replies to the same requests."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lmjax.config import UserError

Z = 1.959963984540054  # of a normal distribution, 95% is within so many standard deviations


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
    wins and losses do, so that with ties the interval is wider than it need be.

    Args:
      scores: of the model's replies.
      others: of the other model's replies to the same requests.

    Raises:
      UserError: there is no request, or a score is not finite.
    """
    if not len(scores) or not (np.isfinite(scores).all() and np.isfinite(others).all()):
        raise UserError(f"a win rate needs finite scores of one request or more, not {scores}")
    count = len(scores)
    rate = float(np.mean(scores > others) + 0.5 * np.mean(scores == others))
    centre = rate + Z**2 / (2 * count)
    spread = Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    # Where one model wins all requests, rounding would put the end of the interval beyond the rate.
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    return WinRate(rate, min(low, rate), max(high, rate))
