"""Scores of people and of published models beside those of a model."""

import pytest

from lmjax.config import UserError, replace
from lmjax.evaluation import tasks as all_tasks
from lmjax.evaluation.reference_scores import (
    PEOPLE,
    PUBLISHED,
    Publication,
    check_published,
    reference_table,
)
from lmjax.evaluation.requests import Likelihood, Written
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks import MMLU, Arc, BoolQ, Lambada, SQuAD, task
from lmjax.evaluation.tasks.task import Item, Question


def result(kind, shots=0, answers=2, **settings):
    """A result of two items, both right."""
    choices = tuple(map(str, range(answers)))
    asked = kind(**settings)
    item = Item("Q", "0", choices, 0)
    questions = [Question(item, "Q", asked.requests(item, "Q"), shots)] * 2
    given = [Likelihood(-1.0 - n, n == 0, 1) for n in range(len(questions[0].requests))]
    return TaskResult.of(asked, questions, [given] * 2)


def rows(found, *published):
    table = reference_table({"ours": found}, published)
    return {row[0]: dict(zip(table.columns[1:], row[1:])) for row in table.rows}


def test_only_the_same_task_measure_and_shots_are_compared():
    found = [
        result(BoolQ, path="boolq.jsonl"),
        result(Arc, path="ARC-Challenge-Test.jsonl"),
        result(Arc, path="tfds:ai2_arc/ARC-Easy/test", title="easy"),
        result(Arc, 25, path="ARC-Challenge-Test.jsonl", title="with 25"),
        result(Lambada, path="lambada.jsonl"),
    ]
    table = rows(found, "LLaMA 7B", "GPT-2 124M")
    none = {"people": None, "GPT-2 124M": None}
    assert table["BoolQ 0-shot acc"] == {
        **{"people": 0.90, "LLaMA 7B": 0.765, "GPT-2 124M": None, "ours": 1.0}
    }
    assert table["Arc 0-shot acc_norm"] == {**none, "LLaMA 7B": 0.476, "ours": 1.0}
    assert table["easy 0-shot acc_norm"]["LLaMA 7B"] == 0.728
    assert not any(name.startswith("with 25") for name in table)
    assert table["Lambada 0-shot perplexity"]["GPT-2 124M"] == 35.13
    assert table["Lambada 0-shot acc"]["LLaMA 7B"] is None
    assert reference_table({"ours": [found[-1]]}, ()) is None  # nobody reported how people do


def test_people_stand_there_unasked():
    assert rows([result(MMLU, 5, 4, path="mmlu")])["MMLU 5-shot acc"]["people"] == 0.898


def test_part_of_a_set_or_another_set_of_the_class_has_no_references():
    some = result(MMLU, 5, 4, path="mmlu", subjects=("astronomy",))
    assert reference_table({"ours": [some]}, ("LLaMA 7B",)) is None
    squad = SQuAD(path="dev-v1.1.json")
    item = Item("Q", "a", details={"answers": ("a",)})
    found = {}
    for path, version in (
        *(("dev-v1.1.json", "1.1"), ("dev-v1.1.json", "2.0"), ("xquad/xquad.zh.json", "1.1")),
        *(("tfds:squad/v2.0:3.0.0/validation", "2.0"), ("dev-v2.0.json", "1.1")),
    ):
        task = replace(squad, path=path, version=version)
        results = TaskResult.of(task, [Question(item, "Q", (), 0)], [[Written(("a",))]])
        table = reference_table({"ours": [results]}, ())
        found[path, version] = None if table is None else table.rows[0][1]
    assert found == {
        ("dev-v1.1.json", "1.1"): 0.823,
        ("dev-v1.1.json", "2.0"): None,
        ("xquad/xquad.zh.json", "1.1"): None,
        ("tfds:squad/v2.0:3.0.0/validation", "2.0"): 0.868,
        ("dev-v2.0.json", "1.1"): None,
    }


def test_every_row_is_of_a_task_and_a_measure_that_there_are():
    sources = [*PUBLISHED.values(), Publication("", PEOPLE)]
    for one in (reference for source in sources for reference in source.scores):
        kind = getattr(all_tasks, one.task)
        assert issubclass(kind, task.EvaluationTask)
        [measure] = [measure for measure in kind.measures if measure.name == one.measure]
        assert one.score < 1 or measure.more_is_better is False


def test_an_unknown_model_has_near_names():
    with pytest.raises(UserError, match="'LLaMA 7b' are known here; of LLaMA 7B"):
        check_published(("LLaMA 7b",))
