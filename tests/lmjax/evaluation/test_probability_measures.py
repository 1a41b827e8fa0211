"""pass@k beside all draws, calibration beside its definition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.calibration import choice_confidence, reliability
from lmjax.evaluation.pass_at_k import pass_at_k


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_by_drawing_in_all_ways(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        expected = sum(map(any, draws)) / len(draws)
        assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("k", "chance"), [(1, 0.3), (3, 0.3), (5, 0.05)])
def test_pass_at_k_is_unbiased(k, chance):
    """Its mean over all numbers of right samples, each as likely as it is."""
    n = 8
    weights = [math.comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_and_mistakes():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    for bad in ((3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(UserError, match="k must be from 1"):
            pass_at_k(*bad)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 12),
)
@settings(max_examples=100, deadline=None)
def test_calibration_error_by_its_definition(rows, bins):
    sure, right = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    expected = 0.0
    for number in range(bins):
        inside = np.ceil(sure * bins) - 1 == number
        inside |= (sure == 0) & (number == 0)
        if inside.any():
            gap = abs(right[inside].mean() - sure[inside].mean())
            expected += inside.mean() * gap
    found = reliability(sure, right, bins)
    assert found.error == pytest.approx(expected, abs=1e-12)
    assert found.counts.sum() == len(rows)


def test_calibration_of_a_calibrated_model_and_of_a_boaster():
    random = np.random.default_rng(0)
    sure = random.uniform(size=20_000)
    right = random.uniform(size=len(sure)) < sure
    # About sqrt(0.25 / 2000) in each of ten bins, on average 0.8 of it.
    assert reliability(sure, right).error < 0.02
    assert reliability(np.ones(10), np.zeros(10, bool)).error == 1
    table = reliability(sure, right, 4).table("arc")
    assert [row[0] for row in table.rows][:2] == ["arc, 0.00 to 0.25", "arc, 0.25 to 0.50"]
    assert table.rows[0][2] == pytest.approx(1 / 8, abs=0.01)


def test_calibration_of_choices():
    logs = np.log([[0.2, 0.1, 0.1], [0.5, 0.5, 1e-300]])
    np.testing.assert_allclose(choice_confidence(logs - 1e4), [0.5, 0.5])
    assert choice_confidence(np.array([[-1.0, -np.inf]])) == [1]
    with pytest.raises(UserError, match="question 1"):
        choice_confidence(np.array([[-1.0, -2], [-1, np.nan]]))
    for bad in ([1.5], [np.nan], []):
        with pytest.raises(UserError, match="calibration"):
            reliability(np.array(bad, float), np.ones(len(bad), bool))
