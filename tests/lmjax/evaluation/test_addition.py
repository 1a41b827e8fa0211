"""Sums as a task: what is asked was held out, and its measures are those of their definitions."""

import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import SumTexts
from lmjax.data.documents import is_held_out
from lmjax.evaluation.edit_distance import edit_distance
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, Written, WrittenRequest
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks import Addition

texts = st.text("ab1", max_size=6)


@given(texts, texts)
def test_edit_distance_by_its_recursion(first, second):
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        exchanged = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(exchanged, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    assert edit_distance(first, second) == distance(len(first), len(second))


def test_no_sum_of_the_training_is_asked():
    source = SumTexts(digits=2, number=5000)
    trained = {d.group for d in source.documents() if not is_held_out(d, 0.2)}
    for digits in (1, 2):
        items = Addition(digits=digits, held_out=0.2, items=40).read_items("")
        assert len({item.prompt for item in items}) == len(items)
        assert not {item.prompt for item in items} & trained
        for item in items:
            first, second = map(int, item.identity.split("+"))
            assert len(str(first)) == len(str(second)) == digits
            assert int(item.answer) == first + second
    assert len(items) == 40
    assert 10 < len(Addition(digits=1, held_out=0.2, items=400).read_items("")) < 32  # of 100


def test_questions_are_as_the_training_has_them_and_the_same_again():
    task = Addition(digits=2, items=5, shots=2, units_first=True)
    questions = task.questions()
    assert questions == Addition(digits=2, items=5, shots=2, units_first=True).questions()
    written, scored = questions[0].requests
    *examples, asked = questions[0].context.split("\n")
    assert len(examples) == 2 and asked == questions[0].item.prompt
    for example in examples:
        numbers, answer = example.split("=")
        assert sum(map(int, numbers.split("+"))) == int(answer[::-1])
    assert written == WrittenRequest(questions[0].context, ("\n",), 5)
    assert scored == ContinuationRequest(questions[0].context, questions[0].item.answer + "\n")


def test_measures_by_hand():
    task = Addition(digits=2, items=3)
    questions = task.questions()
    right = [question.item.answer for question in questions]
    said = [right[0], right[1] + "0", ""]
    nats = [-1.0, -2.0, -3.0]
    answers = [
        [Written((text,)), Likelihood(value, False, len(answer) + 1)]
        for text, value, answer in zip(said, nats, right, strict=True)
    ]
    result = TaskResult.of(task, questions, answers)
    exact, edits, bits = (result.estimate(measure).value for measure in task.measures)
    assert exact == pytest.approx(1 / 3)
    assert edits == pytest.approx((0 + 1 + len(right[2])) / 3)
    assert bits == pytest.approx(6 / (sum(map(len, right)) + 3) / math.log(2))


def test_mistakes_are_told():
    with pytest.raises(UserError, match="the sums are made"):
        Addition(path="sums.jsonl")
    with pytest.raises(UserError, match="must be above 0"):
        Addition(held_out=0.0)
    with pytest.raises(UserError, match="items=0: must be at least 1"):
        Addition(items=0)
    with pytest.raises(UserError, match="no sum of 1 digits is held out by held_out=1e-06"):
        Addition(digits=1, held_out=1e-6, items=1).questions()
