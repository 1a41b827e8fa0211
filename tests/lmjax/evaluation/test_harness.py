"""Requests and scores of EleutherAI's harness with transformers, kept by harness_golden.py."""

import json

import jax
import pytest

from lmjax.evaluation.answering import Answering
from lmjax.evaluation.likelihood import Fitted, rolling_windows
from lmjax.evaluation.requests import (
    ContinuationRequest,
    Likelihood,
    RollingRequest,
    WrittenRequest,
)
from lmjax.evaluation.task_evaluator import result_of
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks import Arc, HellaSwag, Lambada, TruthfulQA1, TruthfulQA2, WikiText
from lmjax.parallel import Mesh
from tests.lmjax.evaluation.harness_golden import FOLDER, GOLDEN
from tests.lmjax.evaluation.scored_models import TOKENIZER, read_model

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

# The others have what these have: `test_parity` compares their logits and tokens.
FAMILIES = (
    "train_gpt2",
    "bloom",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("train_llama", "gemma2")),
)


@pytest.fixture(scope="module")
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request, golden, mesh):
    """A model ready to answer, and what the harness got from it."""
    if request.param not in golden["models"]:
        pytest.skip("the harness was not run with it")
    found = golden["models"][request.param]
    return Answering(read_model(request.param, found["max_length"])), found


def test_every_answer_and_score_is_the_harnesss(golden, asked):
    answering, found = asked
    given = list(zip(golden["requests"], found["answers"], strict=True))
    pairs = [(ContinuationRequest(*rest), wanted) for (_, *rest), wanted in given if rest[1:]]
    answers = answering.answers([request for request, _ in pairs])
    for (request, (value, greedy)), answer in zip(pairs, answers, strict=True):
        assert answer.log_probability == pytest.approx(float(value), abs=1e-4), request
        assert answer.is_greedy == (str(greedy) == "True")
    texts = [(rest[0], float(wanted)) for (_, *rest), wanted in given if not rest[1:]]
    twice = [begun_twice(answering, text) for text, _ in texts]
    assert twice == pytest.approx([wanted for _, wanted in texts], rel=1e-6)
    for name, (task, measures) in TASKS.items():
        result = result_of(task, task.questions(), answering)
        if name == "own_wikitext":  # with the harness's likelihoods
            answers = [[Likelihood(value, False, 1)] for value in twice]
            result = TaskResult.of(task, result.questions, answers)
        for measure in task.measures:
            if measure.name in measures:
                theirs = found["scores"][name][f"{measures[measure.name]},none"]
                ours = result.estimate(measure).value
                assert ours == pytest.approx(float(theirs), rel=1e-5), (name, measure)


def begun_twice(answering, text):
    """A text's log-likelihood as the harness's model has it: it scores the first separator too.

    Its tokenizer puts one in front of the text, and the windows begin with another.
    """
    scorer, tokens = answering.scorer, [96, *TOKENIZER.encode(text)]
    windows = rolling_windows(tokens, scorer.beginning, scorer.config.max_length)
    found = scorer.score([Fitted(pair, 0) for pair in windows])
    return sum(one.log_probability for one in found)


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
