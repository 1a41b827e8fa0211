"""Classes by cloze: requests, scores by hand, a real model's macro F1, and mistakes."""

import jax
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.requests import ContinuationRequest, Likelihood
from lmjax.evaluation.task_classes import class_tables, task_confusion
from lmjax.evaluation.task_evaluator import result_of
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.task_tables import calibration_table, error_table
from lmjax.evaluation.tasks import ClozeClasses
from lmjax.generation import load_run
from lmjax.parallel import Mesh
from tests.lmjax.evaluation.test_tasks import lines  # noqa: F401
from tests.lmjax.jobs.test_evaluate import write_run

WORDS = ("terrible", "great")


def records(count=4):
    return [{"text": f"Film {n} {{ran}}.", "label": n % 2} for n in range(count)]


def answers(*values):
    return [Likelihood(value, False, 1) for value in values]


def test_each_classs_words_are_scored_behind_the_filled_template(lines):  # noqa: F811
    task = ClozeClasses(path=lines(*records()), words=WORDS)
    question = task.questions()[1]
    assert question.context == "Film 1 {ran}. It was"
    assert question.item.gold == 1 and question.item.answer == "great"
    assert question.requests == tuple(
        ContinuationRequest(question.context, f" {words}") for words in WORDS
    )
    shown = ClozeClasses(path=lines(*records(2)), words=WORDS, shots=1).questions()[0]
    assert shown.context == "Film 1 {ran}. It was great\n\nFilm 0 {ran}. It was"


@pytest.mark.parametrize("label", ["1", 1, "pos"])
def test_classes_by_number_name_or_word(lines, label):  # noqa: F811
    labels = ("neg", "pos") if label == "pos" else ()
    given = {"title": "A", "text": "b", "kind": label}
    settings = {"template": "{title}: {text} So", "label": "kind", "labels": labels}
    [question] = ClozeClasses(path=lines(given), words=WORDS, **settings).questions()
    assert (question.context, question.item.gold) == ("A: b So", 1)
    [question] = ClozeClasses(path=lines({"text": "b", "label": "great"}), words=WORDS).questions()
    assert question.item.gold == 1


def test_scores_by_hand(lines):  # noqa: F811
    """Alone "great" is e times as likely; behind the text it is 1.65 times, which says terrible."""
    task = ClozeClasses(path=lines(*records()), words=WORDS, domain="It was")
    questions = task.questions()
    assert questions[0].requests[2:] == tuple(
        ContinuationRequest("It was", f" {words}") for words in WORDS
    )
    given = answers(-3.0, -2.5, -3.0, -2.0)
    # By characters: -3.0 / 8 is above -2.5 / 5.
    found = task.measure(questions[0].item, given)
    assert found == {"acc": 0.0, "acc_norm": 1.0, "acc_pmi": 1.0}
    assert task.measure(questions[1].item, given) == {"acc": 1.0, "acc_norm": 0.0, "acc_pmi": 0.0}
    assert task.chance(questions[0].item) == {"acc": 0.5, "acc_norm": 0.5, "acc_pmi": 0.5}
    result = TaskResult.of(task, questions, [given, given, given, answers(-1.0, -2.0, 0.0, 0.0)])
    np.testing.assert_array_equal(task_confusion(result), [[0, 2], [1, 1]])
    scores, confusion = class_tables({"model": [result]})
    # great: precision 1/3, recall 1/2; terrible has 0. Always terrible: 2/3 and 0.
    assert scores.rows == (("ClozeClasses 0-shot macro_f1", pytest.approx(1 / 3), 0.2),)
    assert confusion.rows[0][:3] == ("terrible", 0.0, 1.0)
    assert calibration_table({"model": [result]}) is not None
    assert "'great'" in error_table("model", [result]).rows[0][1]


def test_a_model_is_asked(lines, tmp_path):  # noqa: F811
    """Its likeliest words are those of a loop over the requests, one by one."""
    write_run(tmp_path / "run", 0)
    task = ClozeClasses(path=lines(*records(6)), words=WORDS, domain="It was")
    questions = task.questions()
    with jax.set_mesh(Mesh().build()):
        answering = Answering(load_run(tmp_path / "run"), 4)
        result = result_of(task, questions, answering)
        alone = [[answering.answers([r])[0] for r in one.requests] for one in questions]
    for found, wanted in zip(result.answers, alone, strict=True):
        np.testing.assert_allclose(
            [one.log_probability for one in found],
            [one.log_probability for one in wanted],
            rtol=1e-5,  # float32 in batches of other sizes
        )
    logs = np.array([[one.log_probability for one in given] for given in alone])
    gold = np.arange(6) % 2
    estimates = {m.name: result.estimate(m).value for m in task.measures}
    assert estimates["acc"] == np.mean(logs[:, :2].argmax(1) == gold)
    assert estimates["acc_pmi"] == np.mean((logs[:, :2] - logs[:, 2:]).argmax(1) == gold)


def test_mistakes_are_told(lines):  # noqa: F811
    path = lines({"text": "a", "label": "2"})
    with pytest.raises(UserError, match=r"line 1: label is '2'; it must be one of terrible, great"):
        ClozeClasses(path=path, words=WORDS).questions()
    with pytest.raises(UserError, match=r"label is '2'; it must be one of neg, pos$"):
        ClozeClasses(path=path, words=WORDS, labels=("neg", "pos")).questions()
    with pytest.raises(UserError, match="words: give those of each class"):
        ClozeClasses(path=path).questions()
    with pytest.raises(UserError, match=r"line 1: there is no field body; fields: text, label"):
        ClozeClasses(path=lines(*records()), words=WORDS, template="{body} So").questions()
    for wrong, match in (
        ({"words": ("a",)}, "two classes or more"),
        ({"words": ("a", "a")}, "each class has its own"),
        ({"words": WORDS, "labels": ("x",)}, "there are 2 classes in words"),
        ({"words": WORDS, "template": "It was"}, "it has no field"),
        ({"words": WORDS, "template": "{text} It was "}, "belongs to the words"),
    ):
        with pytest.raises(UserError, match=match):
            ClozeClasses(path="x", **wrong)
