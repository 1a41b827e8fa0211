"""Macro F1, confusions and calibration of tasks, beside hand-worked cases and written-out loops."""

import numpy as np
import pytest

from lmjax.evaluation.requests import Likelihood, Written
from lmjax.evaluation.task_classes import class_tables, classes_of, task_confusion
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.task_tables import calibration_pictures, calibration_table
from lmjax.evaluation.tasks import Addition, Arc, BoolQ
from lmjax.evaluation.tasks.task import Item, Question


def result_of(golds, logs, choices=("no", "yes"), task=None):
    """A result whose choices have these log-likelihoods."""
    questions, answers = [], []
    for number, (gold, values) in enumerate(zip(golds, logs, strict=True)):
        item = Item(f"{number}?", choices[gold], choices, gold)
        questions.append(Question(item, item.prompt, (), 0))
        answers.append([Likelihood(value, False, 1) for value in values])
    return TaskResult.of(task or BoolQ(path="x"), questions, answers)


YES, NO = (-2.0, -1.0), (-1.0, -2.0)


def test_macro_f1_by_hand():
    """no: precision 2/3, recall 2/4, F1 4/7. yes: precision 1/3, recall 1/2, F1 2/5."""
    result = result_of([0, 0, 0, 0, 1, 1], [NO, NO, YES, YES, YES, NO])
    np.testing.assert_array_equal(task_confusion(result), [[2, 2], [1, 1]])
    scores, confusion = class_tables({"model": [result]})
    assert scores.columns == ("task", "commonest", "model")
    # Always no: precision 4/6, recall 1, F1 4/5; yes has 0.
    assert scores.rows == (("BoolQ 0-shot macro_f1", 0.4, pytest.approx((4 / 7 + 2 / 5) / 2)),)
    assert confusion.title == "Confusion of BoolQ 0-shot, model"
    assert confusion.rows[0] == ("no", 0.5, 0.5, pytest.approx(4 / 7))
    assert confusion.rows[1] == ("yes", 0.5, 0.5, pytest.approx(2 / 5))


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_by_a_loop(seed):
    """Precision and recall of each class are counted item by item."""
    random = np.random.default_rng(seed)
    choices = tuple("ABCD")
    golds = random.integers(0, 3, 40)  # one class has no item
    logs = random.normal(size=(40, 4)).tolist()
    result = result_of(golds.tolist(), logs, choices)
    scores = []
    for name in range(4):
        hits = wrong = missed = 0
        for gold, values in zip(golds, logs, strict=True):
            predicted = values.index(max(values))
            hits += predicted == name == gold
            wrong += predicted == name != gold
            missed += gold == name != predicted
        if hits + wrong + missed:
            precision = hits / (hits + wrong) if hits + wrong else 0.0
            recall = hits / (hits + missed) if hits + missed else 0.0
            both = precision + recall
            scores.append(2 * precision * recall / both if both else 0.0)
    [row] = class_tables({"model": [result]})[0].rows
    assert row[2] == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_tasks_without_classes_have_no_confusion():
    """Choices that differ between items are none, nor are texts that are written."""
    arc = result_of([0, 1], [YES, NO], task=Arc(path="x"))
    other = result_of([0], [YES], ("a", "b"), task=Arc(path="x"))
    mixed = TaskResult.of(
        arc.task, [*arc.questions, *other.questions], [*arc.answers, *other.answers]
    )
    assert classes_of(arc) == ("no", "yes") and classes_of(mixed) == ()
    task = Addition(items=2)
    questions = task.questions()
    answers = [[Written(("1",)), Likelihood(-1.0, False, 2)] for _ in questions]
    sums = TaskResult.of(task, questions, answers)
    assert not sums.chooses
    assert class_tables({"model": [mixed, sums]}) == []
    assert calibration_table({"model": [sums]}) is None
    assert calibration_pictures("model", [sums]) is None


def test_calibration_of_a_task_by_hand():
    """Three answers of probability 0.8, of which one is right, and one of 0.6, which is."""
    sure, less = np.log([0.8, 0.2]).tolist(), np.log([0.4, 0.6]).tolist()
    result = result_of([0, 1, 1, 1], [sure, sure, sure, less])
    expected = 3 / 4 * (0.8 - 1 / 3) + 1 / 4 * (1 - 0.6)
    [row] = calibration_table({"a": [result], "b": [result]}).rows
    assert row == ("BoolQ 0-shot acc", pytest.approx(expected), pytest.approx(expected))
    picture = calibration_pictures("a", [result])
    assert (picture.title, picture.picture) == ("Calibration of a", "calibration")
    found = {name: numbers for name, *numbers in picture.rows}
    # Rounding decides on which side of an edge 0.8 and 0.6 are.
    [high] = [v for v in found.values() if v[0] == 0.75]
    [low] = [v for v in found.values() if v[0] == 0.25]
    assert high == [0.75, pytest.approx(0.8), pytest.approx(1 / 3)]
    assert low == [0.25, pytest.approx(0.6), 1.0]
