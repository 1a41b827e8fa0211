"""Requests and scores of EleutherAI's harness with transformers, kept by harness_golden.py."""

import json

import pytest

from lmjax.evaluation.answering import Answering
from lmjax.evaluation.requests import ContinuationRequest, RollingRequest, WrittenRequest
from lmjax.evaluation.task_evaluator import result_of
from lmjax.evaluation.tasks import Arc, HellaSwag, Lambada, TruthfulQA1, TruthfulQA2, WikiText
from tests.lmjax.evaluation.harness_golden import FOLDER, GOLDEN, LENGTHS
from tests.lmjax.evaluation.scored_models import read_model

TASKS = {
    "own_arc": (Arc(path=f"{FOLDER}/arc.jsonl"), {"acc": "acc", "acc_norm": "acc_norm"}),
    "own_hellaswag": (HellaSwag(path=f"{FOLDER}/hellaswag.txt"), {}),
    "own_mc1": (TruthfulQA1(path=f"{FOLDER}/truthfulqa.jsonl"), {"acc": "acc"}),
    "own_mc2": (TruthfulQA2(path=f"{FOLDER}/truthfulqa.jsonl"), {"mc2": "acc"}),
    "own_lambada": (
        Lambada(path=f"{FOLDER}/lambada.jsonl"),
        {"acc": "acc", "perplexity": "perplexity"},
    ),
    "own_wikitext": (
        WikiText(path=f"{FOLDER}/texts.jsonl"),
        {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    ),
}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(params=LENGTHS)
def asked(request, golden, one_device):
    """A model ready to answer, and what the harness got from it."""
    if request.param not in golden["models"]:
        pytest.skip("the harness was not run with it")
    found = golden["models"][request.param]
    return Answering(read_model(request.param, found["max_length"])), found


def test_every_answer_and_score_is_the_harnesss(golden, asked):
    answering, found = asked
    requests = [
        RollingRequest(*rest) if task == "own_wikitext" else ContinuationRequest(*rest)
        for task, *rest in golden["requests"]
    ]
    for request, answer, wanted in zip(
        requests, answering.answers(requests), found["answers"], strict=True
    ):
        value, *greedy = wanted if isinstance(wanted, list) else [wanted]
        # Sums of up to 200 tokens in float32, each library in its own order.
        tolerance = 1e-4 * max(1, answer.tokens / 20)
        assert answer.log_probability == pytest.approx(float(value), abs=tolerance), request
        assert [answer.is_greedy] == [str(one) == "True" for one in greedy] or not greedy
    for name, (task, measures) in TASKS.items():
        result = result_of(task, task.questions(), answering)
        for measure in task.measures:
            if measure.name in measures:
                theirs = found["scores"][name][f"{measures[measure.name]},none"]
                ours = result.estimate(measure).value
                assert ours == pytest.approx(float(theirs), rel=1e-5), (name, measure)


def test_the_requests_of_our_tasks_are_the_harnesss(golden):
    for name, (task, _) in TASKS.items():
        if name == "own_hellaswag":  # whose endings are four in our layout
            continue
        ours = [
            [request.text] if isinstance(request, RollingRequest) else
            [request.context, request.continuation]
            for question in task.questions() for request in question.requests
        ]  # fmt: skip
        assert ours == [rest for task_name, *rest in golden["requests"] if task_name == name]


def test_written_texts_are_the_harnesss(asked):
    answering, found = asked
    prompts, texts = found["written"]
    requests = [WrittenRequest(prompt, ("e",), 8) for prompt in prompts]
    assert [answer.texts[0] for answer in answering.answers(requests)] == texts
