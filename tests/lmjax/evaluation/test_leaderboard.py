"""The four tasks' mean, worked out by hand, and only of the four tasks as they were asked."""

import pytest

from lmjax.config import replace
from lmjax.evaluation.leaderboard import leaderboard_table
from lmjax.evaluation.requests import Likelihood
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks import MMLU, Arc, HellaSwag, TruthfulQA2
from lmjax.evaluation.tasks.mmlu import GROUP_OF
from lmjax.evaluation.tasks.task import Item, Question


def result(task, rights, subjects=None, name="acc"):
    """A result with one score an item."""
    questions = [
        Question(Item("?", "a", ("a", "b"), 0, subject), "?", (), task.shots)
        for subject in subjects or [""] * len(rights)
    ]
    answers = [[Likelihood(-1.0, False, 1)]] * len(rights)
    return TaskResult(task, questions, answers, [{name: right} for right in rights])


def four(**changes):
    arc = Arc(path="ARC-Challenge-Test.jsonl", shots=25)
    # The first subject has two items, of which one is right: 0.5 of it, and 56 others have 1.
    subjects = [next(iter(GROUP_OF)), *GROUP_OF]
    return [
        result(replace(arc, **changes), [1.0, 0.0, 0.0, 0.0], name="acc_norm"),
        result(HellaSwag(path="x", shots=10), [1.0, 0.0], name="acc_norm"),
        result(MMLU(path="x", shots=5), [0.0] + [1.0] * 57, subjects),
        result(TruthfulQA2(path="x"), [0.2, 0.4], name="mc2"),
    ]


def test_the_mean_by_hand():
    table = leaderboard_table({"one": four(), "two": four()})
    rows = {name: values for name, *values in table.rows}
    mmlu = 100 * 56.5 / 57
    assert rows["Arc 25-shot acc_norm"] == [25.0, 25.0]
    assert rows["MMLU 5-shot acc"] == pytest.approx([mmlu] * 2)
    assert rows["mean"] == pytest.approx([(25 + 50 + mmlu + 30) / 4] * 2)
    assert table.columns == ("task", "one", "two")


@pytest.mark.parametrize(
    "changes", [{"shots": 24}, {"limit": 100}, {"path": "ARC-Easy-Test.jsonl"}]
)
def test_other_settings_are_not_the_leaderboards(changes):
    assert leaderboard_table({"one": four(**changes)}) is None


def test_a_task_or_a_subject_is_missing():
    assert leaderboard_table({"one": four()[1:]}) is None
    some = result(MMLU(path="x", shots=5), [1.0], ["astronomy"])
    assert leaderboard_table({"one": [*four()[:2], some, four()[3]]}) is None
