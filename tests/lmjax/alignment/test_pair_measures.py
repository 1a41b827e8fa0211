"""Measures of scores on pairs: against loops, closed forms and models that are right by design."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment.pair_measures import (
    ScoredPairs,
    by_margin,
    calibration,
    calibration_error,
    variance_by_length,
    won,
)
from lmjax.alignment.reward_report import tables_of
from lmjax.data import build_stores
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.tokenizers import ByteTokenizer


def pairs_with(lead, longer=None, margin=None):
    arrays = (np.zeros(len(lead)) if a is None else np.asarray(a, float) for a in (longer, margin))
    return ScoredPairs(np.asarray(lead, float), *arrays)


LEADS = st.lists(st.floats(-8, 8) | st.just(0.0), min_size=1, max_size=60)


@given(LEADS)
def test_bins_hold_each_pair_once(leads):
    """The error is that of a loop over bins and pairs."""
    bins = calibration(pairs_with(leads))
    assert sum(one.share for one in bins) == pytest.approx(1)
    total = 0.0
    for one in bins:
        inside = [
            (1 / (1 + math.exp(-abs(lead))), (lead > 0) + 0.5 * (lead == 0))
            for lead in leads
            if one.low <= 1 / (1 + math.exp(-abs(lead))) < one.high or (one.high == 1 and lead > 40)
        ]
        assert len(inside) == pytest.approx(one.share * len(leads))
        predicted, agreement = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert (one.predicted, one.agreement) == pytest.approx((predicted, agreement))
        total += len(inside) / len(leads) * abs(predicted - agreement)
    assert calibration_error(bins) == pytest.approx(total)


def test_a_model_that_draws_its_labels_is_calibrated():
    """Labels by its own probabilities; 0.01 is six standard errors of 100,000 pairs."""
    random = np.random.default_rng(0)
    lead = random.normal(size=100_000) * 2
    wins = random.random(lead.shape) < 1 / (1 + np.exp(-lead))
    labelled = np.where(wins, lead, -lead)
    assert calibration_error(calibration(pairs_with(labelled))) < 0.01
    # Twice as sure as it should be.
    assert calibration_error(calibration(pairs_with(2 * labelled))) > 0.05


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(-9, 9)), min_size=2, max_size=30))
def test_the_share_that_length_explains_is_that_of_least_squares(rows):
    lead, longer = np.array(rows, float).T
    found = variance_by_length(pairs_with(lead, longer))
    if not lead.any() or not longer.any() or np.sum(lead**2) < 1e-12:
        return
    slope = np.linalg.lstsq(longer[:, None], lead, rcond=None)[0]
    rest = np.sum(np.square(lead - slope * longer))
    assert found == pytest.approx(1 - rest / np.sum(np.square(lead)), abs=1e-9)


def test_a_model_of_length_is_length_alone():
    longer = np.array([3.0, -2.0, 5.0, 0.0])
    assert variance_by_length(pairs_with(0.7 * longer, longer)) == pytest.approx(1)
    assert math.isnan(variance_by_length(pairs_with(longer)))
    assert won(longer) == 2.5 / 4
    assert math.isnan(won(longer[:0]))


def test_margins():
    few = pairs_with([1, -1, 2, 3], margin=[0, 0, 1, 3])
    assert [(margin, part.accuracy) for margin, part in by_margin(few)] == [
        (0, 0.5),
        (1, 1),
        (3, 1),
    ]
    margin = np.random.default_rng(0).random(800)
    many = by_margin(pairs_with(margin, margin=margin))
    assert [len(part) for _, part in many] == [100] * 8
    assert [m for m, _ in many] == sorted(m for m, _ in many)


def test_pairs_of_a_store_and_their_tables(tmp_path):
    """Scores are numbers of documents; the better answer comes first, so it has the lower one."""
    records = [
        {"prompt": "a", "answers": ["12345", "123", "1"], "ranks": [0, 1, 1]},
        {"prompt": "b", "chosen": "12", "rejected": "123456789"},
        {"prompt": "c", "answers": ["12", "34", "5"], "ranks": [2, 0, 1]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    made = build_stores(Comparisons(path=str(path)), ByteTokenizer(), tmp_path / "store")
    [store] = made.values()
    scores = np.arange(8, dtype=np.float32)
    pairs = ScoredPairs.of(store, scores)
    rows = zip(pairs.lead, pairs.longer, pairs.margin, strict=True)
    expected = [(-1, 2, 1), (-2, 4, 1), (-1, -7, 1), (-1, 1, 1), (-1, -1, 1), (-2, 0, 2)]
    assert sorted(rows) == sorted(expected)
    scores[4] = np.nan
    assert len(ScoredPairs.of(store, scores)) == 5
    margins, calibrated, lengths = tables_of({"pairs": pairs})
    assert [row[0] for row in margins.rows] == ["pairs, 1, 5", "pairs, 2, 1"]
    assert calibrated.rows[-1][0] == "pairs, all" and calibrated.rows[-1][3] == 0
    [(name, better, higher, *accuracies, variance)] = lengths.rows
    assert (name, better, higher) == ("pairs, 6", 3.5 / 6, 2.5 / 6)
    assert accuracies == [0, 0] and 0 < variance < 1
    assert len(tables_of({"pairs": pairs.where(pairs.margin == 1)})) == 2
