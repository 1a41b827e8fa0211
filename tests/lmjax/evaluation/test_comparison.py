"""Intervals by simulation and by scipy, exact tests by enumeration, comparisons of corpora."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.bleu import bleu_counts, bleu_of, corpus_bleu
from lmjax.evaluation.comparison import (
    bootstrap_interval,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    score_ratio,
    wilson_interval,
)

ROUNDS = 200
# Coverage of 95% in 200 rounds varies by 1.5%; three of these and what few items cost.
COVERED = (0.90, 0.99)


def covered(truth, interval_of):
    """Share of simulated intervals that have the true number."""
    random = np.random.default_rng(0)
    found = [interval_of(random) for _ in range(ROUNDS)]
    return np.mean([one.low <= truth <= one.high for one in found])


def test_coverage_of_the_paired_bootstrap():
    """Right and wrong answers to 60 questions that are hard for both models or for neither."""

    def compare(random):
        ease = random.uniform(0, 0.8, 60)
        ours, theirs = random.uniform(size=(2, 60)) < [ease + 0.1, ease]
        return paired_bootstrap(ours, theirs, resamples=300)

    assert COVERED[0] < covered(0.1, compare) < COVERED[1]


def test_coverage_of_a_ratio():
    """Of skewed scores, whose percentiles alone lie to one side."""

    def compare(random):
        hard = random.lognormal(size=50)
        scores = hard * random.lognormal(sigma=0.3, size=(2, 50))
        return score_ratio(1.05 * scores[0], scores[1], resamples=300)

    assert COVERED[0] < covered(1.05, compare) < COVERED[1]


def test_coverage_of_means_and_shares():
    def of_shares(random):
        return mean_interval((random.uniform(size=30) < 0.08).astype(float))

    def of_means(random):
        return mean_interval(random.gamma(4, size=25))

    assert COVERED[0] < covered(0.08, of_shares) < COVERED[1]
    assert COVERED[0] < covered(4, of_means) < COVERED[1]


def test_the_test_holds_its_level():
    """Of models that do not differ, 5% are found to."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(ROUNDS):
        hard = random.uniform(size=40)
        ours, theirs = random.uniform(size=(2, 40)) < hard
        found.append(paired_bootstrap(ours, theirs, resamples=200).p)
    assert np.mean(np.array(found) <= 0.05) < 0.05 + 3 * 0.0154
    assert min(found) < 0.1


def test_bca_is_that_of_scipy():
    """Other draws, so equal to what 4,000 of them leave open."""
    values = np.random.default_rng(0).lognormal(size=40)
    found = bootstrap_interval(values, resamples=4000)
    wanted = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="BCa", random_state=1
    ).confidence_interval
    width = wanted.high - wanted.low
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.06 * width)


def test_a_function_of_sums_is_the_mean_where_it_is_the_mean():
    values = np.random.default_rng(0).normal(size=(2, 30))
    rows = [np.stack([one, np.ones(30)], 1) for one in values]
    plain = paired_bootstrap(*values, resamples=200)
    of_sums = paired_bootstrap(*rows, lambda total: total[0] / total[1], resamples=200)
    assert of_sums == pytest.approx(plain, abs=1e-12)


def test_the_randomization_test_by_all_ways():
    ours, theirs = np.array([[3.0, 1, 4, 1, 5, 9], [2, 1, 5, 0, 3, 2]])
    apart = ours - theirs
    ways = [abs(np.dot(signs, apart)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean(np.array(ways) >= abs(apart.sum()) - 1e-9)
    found = paired_bootstrap(ours, theirs, resamples=20_000).p
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))


def test_corpora_are_compared_by_their_bleu():
    references = [[f"the {a} cat sat on {b} old mats"] for a in "abcde" for b in "vwxyz"]
    ours = [one[0] for one in references]
    theirs = [text.replace("sat", "lay") if n % 3 else text for n, text in enumerate(ours)]
    counts = [bleu_counts(texts, references) for texts in (ours, theirs)]
    found = paired_bootstrap(*counts, lambda total: bleu_of(total).score, resamples=200)
    assert found.value == pytest.approx(100 - corpus_bleu(theirs, references).score)
    assert 0 < found.low < found.value < found.high and found.p < 0.01


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_binomial_test(pairs):
    ours, theirs = np.array(pairs).T
    found = mcnemar(ours, theirs)
    count = found.ours + found.theirs
    assert count == np.sum(ours != theirs)
    wanted = scipy.stats.binomtest(found.ours, count).pvalue if count else 1.0
    assert found.p == pytest.approx(wanted, abs=1e-12)


def test_mcnemar_of_many_items():
    ours = np.arange(20_000) < 10_300
    found = mcnemar(ours, ~ours)
    assert found.p == pytest.approx(scipy.stats.binomtest(10_300, 20_000).pvalue, rel=1e-9)


def test_wilson_is_that_of_scipy():
    for right, count in ((0, 10), (3, 10), (500, 1000), (7, 7)):
        found = wilson_interval(right / count, count, 0.9)
        wanted = scipy.stats.binomtest(right, count).proportion_ci(0.9, method="wilson")
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_the_interval_of_a_mean_is_students():
    values = np.array([0.2, 0.9, 0.4, 0.7])
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_what_cannot_be_compared_is_refused():
    some = np.ones(3)
    for call, message in [
        (lambda: paired_bootstrap.__wrapped__(some, np.ones(4)), "of the same items"),
        (lambda: paired_bootstrap(some, np.array([1, np.nan, 0])), "item 1 has"),
        (lambda: bootstrap_interval(np.ones(1)), "two items or more"),
        (lambda: mean_interval(np.array([0.5])), "give more"),
        (lambda: mean_interval(np.zeros(0)), "of no items"),
        (lambda: wilson_interval(0.5, 0), "there is none"),
        (lambda: score_ratio(some, np.zeros(3)), "with a sum above 0"),
        (lambda: mcnemar.__wrapped__(some > 0, np.ones(4) > 0), "3 answers with 4"),
    ]:
        with pytest.raises(UserError, match=message):
            call()


def test_items_that_are_all_alike():
    found = paired_bootstrap(np.ones(5), np.zeros(5), resamples=100)
    assert (found.value, found.low, found.high) == (1, 1, 1) and found.p < 0.2
    assert paired_bootstrap(np.ones(5), np.ones(5), resamples=100).p == 1
