"""Win rates and their intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.win_rates import judged_wins, win_rate

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


def test_judgements_in_both_orders():
    """Won twice, lost twice, a judge who follows the order, a tie and a win, one order, none."""
    nan = np.nan
    outcomes = np.array([[1, 1], [0, 0], [1, 0], [0.5, 1], [nan, 1], [nan, nan]])
    found = judged_wins(outcomes)
    assert (found.wins, found.losses, found.ties, found.missing) == (2, 1, 2, 1)
    assert found.rate.value == pytest.approx(3 / 5)
    assert found.agreement == pytest.approx(2 / 4)
    # For the reply in front: 1, 0, 1, 0.5, and swapped 0, 1, 1, 0, 0.
    assert found.first == pytest.approx(4.5 / 9)
    assert judged_wins(outcomes, "mean").rate.value == pytest.approx((1 + 0 + 0.5 + 0.75 + 1) / 5)


def test_a_judge_who_follows_the_order_is_seen():
    found = judged_wins(np.tile([1.0, 0.0], (50, 1)))
    assert (found.first, found.agreement, found.ties, found.rate.value) == (1, 0, 50, 0.5)
    assert found.rate.high - found.rate.low < 0.1  # all ties: narrow, and not a point
    one_order = judged_wins(np.ones((5, 1)))
    assert one_order.rate.value == 1 and np.isnan(one_order.agreement)


@pytest.mark.parametrize("ties", [0.0, 0.3, 0.8])
def test_coverage_of_wins_with_ties(ties):
    """95% of 500 intervals have the true rate; three standard errors are 3%."""
    random, chances = np.random.default_rng(0), np.array([0.6 * (1 - ties), ties, 0.4 * (1 - ties)])
    truth, hits, width = chances @ [1, 0.5, 0], 0, []
    for _ in range(500):
        found = judged_wins(random.choice([1, 0.5, 0], (60, 1), p=chances)).rate
        hits += found.low <= truth <= found.high
        width.append(found.high - found.low)
    assert 0.92 <= hits / 500 <= 0.99
    if ties:
        wide = win_rate(np.full(60, 0.5), np.full(60, 0.5))
        assert np.mean(width) < wide.high - wide.low


def test_outcomes_that_are_none():
    with pytest.raises(UserError, match="won, tied and lost"):
        judged_wins(np.array([[0.7]]))
    with pytest.raises(UserError, match="no judgement of any of 1"):
        judged_wins(np.array([[np.nan]]))
