"""Win rates and their intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment.win_rates import win_rate
from lmjax.config import UserError

SCORES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(SCORES)
def test_wins_and_half_the_ties(pairs):
    """Against counting; the other side's rate and interval are the mirror image."""
    scores, others = np.array(pairs, float).T
    found, mirror = win_rate(scores, others), win_rate(others, scores)
    count = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    assert found.rate == pytest.approx(count / len(pairs))
    assert (1 - mirror.high, 1 - mirror.low) == pytest.approx((found.low, found.high))
    assert 0 <= found.low <= found.rate <= found.high <= 1


@pytest.mark.parametrize("wins, low, high", [(0, 0.0, 0.2775), (5, 0.2366, 0.7634)])
def test_the_interval_is_wilsons(wins, low, high):
    """Of ten requests: values of statsmodels' proportion_confint(method="wilson"), 4 digits."""
    scores = np.arange(10) < wins
    found = win_rate(scores.astype(float), np.full(10, 0.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("scores", [[], [np.nan]])
def test_what_cannot_be_compared_is_refused(scores):
    with pytest.raises(UserError, match="finite scores"):
        win_rate(np.array(scores), np.zeros(len(scores)))
