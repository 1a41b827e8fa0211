"""Agreement of annotators, beside scipy and numbers that are known or written out."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from lmjax.annotation.agreement import (
    AnnotatorAgreement,
    agreement,
    cohens_kappa,
    kendalls_tau,
)
from lmjax.config import UserError
from tests.lmjax.annotation.desks import judge, make_desk

RANKS = st.integers(2, 6).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n)] * 2)
)


@given(RANKS)
def test_tau_is_scipys(ranks):
    """To 1e-12: both are a few operations in double precision."""
    expected = kendalltau(*ranks, variant="b").statistic
    assert kendalls_tau(*ranks) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_kappa_of_known_tables():
    """Cohen's own kind of example: 20, 5, 10 and 15 cases give 0.4; and two with equal p."""
    for (both, first, second, none), expected in (
        ((20, 5, 10, 15), 0.4),
        ((45, 15, 25, 15), 0.1304),
        ((25, 35, 5, 35), 0.2593),
    ):
        one = ["yes"] * (both + first) + ["no"] * (second + none)
        other = ["yes"] * both + ["no"] * first + ["yes"] * second + ["no"] * none
        assert cohens_kappa(one, other) == pytest.approx(expected, abs=5e-5)


def confusion_kappa(one, other):
    """Kappa from the whole table of labels, as textbooks write it."""
    names = sorted({*one, *other})
    table = [[sum(pair == (a, b) for pair in zip(one, other)) for b in names] for a in names]
    count = len(one)
    observed = sum(table[i][i] for i in range(len(names))) / count
    rows = [sum(row) / count for row in table]
    columns = [sum(column) / count for column in zip(*table)]
    expected = sum(row * column for row, column in zip(rows, columns))
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


@given(st.lists(RANKS, min_size=1, max_size=5))
def test_agreement_is_that_of_the_written_out_pairs(rankings):
    """To 1e-9: sums of shares against one division of whole numbers."""
    labels = [], []
    for ranks in rankings:
        for i, j in itertools.permutations(range(len(ranks[0])), 2):
            for side in (0, 1):
                a, b = ranks[side][i], ranks[side][j]
                labels[side].append("better" if a < b else "worse" if a > b else "tie")
    found = agreement(rankings)
    same = [a == b for a, b in zip(*labels)]
    assert found.pairs == len(same) / 2 and found.items == len(rankings)
    assert found.same == pytest.approx(sum(same) / len(same))
    assert found.kappa == pytest.approx(confusion_kappa(*labels), abs=1e-9, nan_ok=True)
    taus = [tau for one, other in rankings if not math.isnan(tau := kendalls_tau(one, other))]
    assert found.untied == len(taus)
    assert found.tau == pytest.approx(sum(taus) / len(taus) if taus else math.nan, nan_ok=True)


@given(st.lists(RANKS, min_size=1, max_size=3), st.randoms())
def test_the_order_in_which_answers_are_kept_does_not_matter(rankings, random):
    shuffled = []
    for one, other in rankings:
        order = random.sample(range(len(one)), len(one))
        shuffled.append(([one[i] for i in order], [other[i] for i in order]))
    assert agreement(shuffled) == pytest.approx(agreement(rankings), nan_ok=True)


def test_equal_and_contrary_rankings():
    assert agreement([([0, 1, 2], [0, 1, 2])]) == (1, 3, 1.0, 1.0, 1.0, 1)
    assert agreement([([0, 1, 2], [2, 1, 0])]) == (1, 3, 0.0, -1.0, -1.0, 1)


def rank(desk, name, by_answer):
    """Ranks the item that is shown; `by_answer` is in the order of the file."""
    answers = desk.state(name)["item"]["answers"]
    judge(desk, name, "ranked", ranks=[by_answer[answer] for answer in answers])


def test_the_command_compares_what_both_have_ranked(tmp_path, capsys):
    desk = make_desk(tmp_path)
    rank(desk, "ada", {"zero": 0, "one": 1, "two": 2, "three": 2})
    rank(desk, "ada", {"<b>hello</b>": 0, "hey": 1})
    rank(desk, "bo", {"zero": 1, "one": 0, "two": 2, "three": 3})
    judge(desk, "bo", "skipped")  # what one has skipped is not shared
    AnnotatorAgreement(folder=str(tmp_path / "out")).run()
    shown = capsys.readouterr().out
    # Of six pairs four are said alike: not 0-1 and 2-3. tau-b = (4 - 1) / sqrt(5 * 6).
    assert "ada, bo: 1 items, 6 pairs" in shown
    assert "0.667" in shown and f"{3 / math.sqrt(30):.3f}" in shown


def test_an_undone_ranking_does_not_count(tmp_path):
    desk = make_desk(tmp_path)
    for name in ("ada", "bo"):
        rank(desk, name, {"zero": 0, "one": 1, "two": 2, "three": 3})
    judge(desk, "ada", "undone")
    with pytest.raises(UserError, match="no two annotators"):
        AnnotatorAgreement(folder=str(tmp_path / "out")).run()


def test_a_folder_that_is_not_there_is_told():
    with pytest.raises(UserError, match="Which folder"):
        AnnotatorAgreement().run()
    with pytest.raises(UserError, match="nowhere"):
        AnnotatorAgreement(folder=str(Path("nowhere"))).run()
