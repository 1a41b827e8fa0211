"""Questions in a chat format: prompts character by character, choices without their space."""

import pytest

from lmjax.data.chat.catalogue import chat_template
from lmjax.data.chat.templates import PLAIN
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation.chat_questions import in_chat, reply_ends
from lmjax.evaluation.requests import ContinuationRequest, RollingRequest, WrittenRequest
from lmjax.evaluation.tasks import GSM8K, Arc, HarnessTask, Lambada, WinoGrande
from lmjax.evaluation.tasks.task import Item, Question
from tests.lmjax.evaluation.test_tasks import arc, lines  # noqa: F401

CHATML = chat_template("chatml")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER, REPLY = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def test_choices_are_scored_without_their_space(lines):  # noqa: F811
    task = Arc(path=lines(arc("What melts?"), arc("What falls?", key="B")), shots=1)
    question = in_chat(task, task.questions()[0], CHATML)
    asked = "Question: What falls?\nAnswer: stone\n\nQuestion: What melts?\nAnswer:"
    assert question.context == SYSTEM + USER + asked + REPLY
    assert question.requests == tuple(
        ContinuationRequest(question.context, choice, special=True) for choice in ("ice", "stone")
    )


def test_what_stands_before_examples_is_the_systems(lines):  # noqa: F811
    task = HarnessTask(
        path=lines({"q": "1?", "a": "2"}),
        doc_to_text="q",
        doc_to_target="a",
        preamble="Answer {{q}}\n\n",
        metrics=("exact_match",),
    )
    [question] = task.questions()
    found = in_chat(task, question, CHATML, ("<|im_end|>", "\n\n"))
    head = "<|im_start|>system\nAnswer 1?\n\n<|im_end|>\n"
    [request] = found.requests
    assert request.prompt == found.context == head + USER + "1?" + REPLY
    assert request.stop == ("\n\n", "<|im_end|>") and request.special


def test_two_contexts_and_one_continuation(lines):  # noqa: F811
    record = {"sentence": "A _ is red.", "option1": "rose", "option2": "sea", "answer": "1"}
    task = WinoGrande(path=lines(record))
    found = in_chat(task, task.questions()[0], CHATML)
    assert [request.context for request in found.requests] == [
        SYSTEM + USER + text + REPLY for text in ("A rose", "A sea")
    ]
    assert {request.continuation for request in found.requests} == {"is red."}


def test_one_continuation_and_written_and_whole_texts(lines):  # noqa: F811
    """The harness keeps the space where a task has no choices."""
    lambada = Lambada(path=lines({"text": "a cup of tea"}))
    [request] = in_chat(lambada, lambada.questions()[0], PLAIN).requests
    prompt = "User: a cup of\n\nAssistant:"
    assert request == ContinuationRequest(prompt, " tea", special=True)
    gsm = GSM8K(path=lines({"question": "1+1?", "answer": "#### 2"}))
    ends = reply_ends(PLAIN, ByteTokenizer())
    [request] = in_chat(gsm, gsm.questions()[0], PLAIN, ends).requests
    assert isinstance(request, WrittenRequest) and "\n\nUser:" in request.stop
    whole = Question(Item("text", ""), "", (RollingRequest("text"),), 0)
    assert in_chat(lambada, whole, PLAIN) == whole


@pytest.mark.parametrize("name", ["plain", "bare"])
def test_ends_of_replies(name):
    ends = reply_ends(chat_template(name), ByteTokenizer())
    assert ("\n\nUser:" in ends) == (name == "plain")
