"""Rankings of the page, read as a comparison of two models."""

import numpy as np
import pytest

from lmjax.annotation.journal import read_journals
from lmjax.annotation.model_wins import ModelWins, model_wins, ranked_outcomes
from lmjax.config import UserError
from lmjax.evaluation.win_rates import judged_wins
from tests.lmjax.annotation.desks import judge, make_desk

LINES = [{"prompt": f"Question {n}", "answers": [f"before {n}", f"after {n}"]} for n in range(8)]


def rank(desk, annotator, choose):
    """Ranks all items; `choose` gives the better of the answers that are shown, or None."""
    while (item := desk.state(annotator)["item"]) is not None:
        best = choose(item["answers"])
        ranks = [0 if best in (None, answer) else 1 for answer in item["answers"]]
        judge(desk, annotator, "ranked", ranks=ranks)


def by_number(answers):
    """After is better of even questions, before of question 1, the others are ties."""
    number = int(answers[0].split()[1])
    if number % 2 == 0:
        return f"after {number}"
    return "before 1" if number == 1 else None


def test_a_persons_rankings_are_a_comparison(tmp_path):
    desk = make_desk(tmp_path, LINES)
    rank(desk, "ada", by_number)
    journals = read_journals(tmp_path / "out")
    outcomes, in_front = ranked_outcomes(journals, ("before", "after"), 1, 0)
    found = judged_wins(outcomes, in_front=in_front)
    assert (found.wins, found.losses, found.ties) == (4, 1, 3)
    assert found.rate.value == pytest.approx((4 + 1.5) / 8)
    assert 0 < in_front.sum() < 8  # the page shuffles, and the reader puts it right
    mirror, _ = ranked_outcomes(journals, ("before", "after"), 0, 1)
    np.testing.assert_array_equal(mirror, 1 - outcomes)


def test_two_people_and_an_order_that_leads_one(tmp_path):
    desk = make_desk(tmp_path, LINES)
    rank(desk, "ada", lambda answers: next(one for one in answers if "after" in one))
    rank(desk, "bob", lambda answers: answers[0])
    table = model_wins(read_journals(tmp_path / "out"), ("before", "after"))
    ((name, rate, low, high, won, lost, tied, agreement, first),) = table.rows
    assert name == "after beside before" and lost == 0 and won + tied == 8
    assert low <= rate == (won + tied / 2) / 8 <= high
    assert agreement == won / 8
    # Bob always takes the first; ada's choice stands there as often as bob agrees, in his order.
    outcomes, in_front = ranked_outcomes(read_journals(tmp_path / "out"), ("before", "after"), 1, 0)
    assert judged_wins(outcomes[:, 1:], in_front=in_front[:, 1:]).first == 1
    assert 0.5 < first < 1


def test_what_is_no_comparison_is_refused(tmp_path):
    desk = make_desk(tmp_path, LINES)
    with pytest.raises(UserError, match="nobody has ranked"):
        ranked_outcomes({}, ("before", "after"), 0, 1)
    rank(desk, "ada", by_number)
    with pytest.raises(UserError, match="2 answers, and there are 3 models"):
        model_wins(read_journals(tmp_path / "out"), ("a", "b", "c"))
    with pytest.raises(UserError, match="models=before,after"):
        ModelWins(folder=str(tmp_path)).run()
