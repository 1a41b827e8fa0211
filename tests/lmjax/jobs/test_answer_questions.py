"""Questions whose answers are parts of a context: rows, training, measures."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import Data, Domain, LabelledTexts, build_stores
from lmjax.data.groups import Groups
from lmjax.data.questions import Questions, context_tokens
from lmjax.data.tokenizers import Bytes, ByteTokenizer
from lmjax.evaluation.answer_measures import AnswerMeasures
from lmjax.evaluation.held_out import HeldOut
from lmjax.jobs.answer_questions import AnswerQuestions
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    LoRA,
    SpanHeadConfig,
    TransformerConfig,
)
from lmjax.objectives.text_spans import TextSpans
from lmjax.parallel import training_layout
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant

LENGTH, END = 24, 256
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, head_dim=4, causal=False),
    feed_forward=FeedForwardConfig(size=32),
    token_types=2,
    word_head=False,
    heads=(SpanHeadConfig(),),
)


def question(context, *answers, text="q?"):
    found = {"text": list(answers), "answer_start": [context.index(a) for a in answers]}
    return {"question": text, "context": context, "answers": found}


def store_of(folder, records):
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = Questions(path=str(folder / "questions.jsonl"))
    return build_stores(source, ByteTokenizer(), folder / "store")["all"]


def rows_of(store, length=LENGTH):
    rows, objective = Groups(store, length, 1, keeps_begin=True), TextSpans()
    index = np.arange(rows.count)
    tokens, segments = rows.read(index, 0 * index)
    further = {"spans": rows.spans(index, 0 * index), "labels": rows.labels(index, 0 * index)}
    return objective.prepare(tokens, segments, np.zeros(len(index), np.uint64), **further)


@given(
    words=st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=5),
    drawn=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_the_span_is_that_of_the_words_of_the_answer(words, drawn, tmp_path_factory):
    """By counting bytes, as each is a token; an answer beyond the row is not learnt."""
    context = " ".join(words)
    first = drawn.draw(st.integers(0, len(words) - 1))
    last = drawn.draw(st.integers(first, len(words) - 1))
    low = sum(len(word) + 1 for word in words[:first])
    answer = " ".join(words[first : last + 1])
    record = {"question": "q?", "context": context}
    record["answers"] = {"text": [answer], "answer_start": [low]}
    none = {**record, "answers": {"text": [], "answer_start": []}}
    length = drawn.draw(st.integers(6, LENGTH))
    example = rows_of(store_of(tmp_path_factory.mktemp("questions"), [record, none]), length)
    before = [*ByteTokenizer().opening, *b"q?", *(ByteTokenizer().closing or (END,))]
    # The white space before a word is of the word.
    start = len(before) + low - (first > 0)
    end = len(before) + low + len(answer) - 1
    known = end + 1 < length
    assert example.targets.weights[:, 0].tolist() == [float(known), 1.0]
    assert example.targets.starts[:, 0].tolist() == [start * known, 0]
    assert example.targets.ends[:, 0].tolist() == [end * known, 0]
    size = min(length, len(before) + len(context) + len(ByteTokenizer().closing))
    types = [0] * len(before) + [1] * (size - len(before)) + [0] * (length - size)
    assert example.inputs.token_types[0].tolist() == types


def test_words_do_not_depend_on_the_answer():
    tokens, characters = context_tokens(ByteTokenizer(), "In 1867, he")
    assert bytes(tokens) == b"In 1867, he"
    assert characters == [(0, 2)] * 2 + [(3, 7)] * 5 + [(7, 8)] + [(9, 11)] * 3


def test_measures_of_known_logits(tmp_path, one_device):
    """Logits that are 1 at the ends of an answer find it; where there is none, the first token."""
    records = [
        question("It was 1867, in May.", "1867", "It"),
        question("The cat sat.", "cat"),
        question("no such thing"),
    ]
    store = store_of(tmp_path, records)
    example = rows_of(store, 32)
    logits = np.zeros((3, 32, 2), np.float32)
    logits[np.arange(3), example.targets.starts[:, 0], 0] = 1
    logits[np.arange(3), example.targets.ends[:, 0], 1] = 1
    rest = TextSpans(), training_layout(), 32, 257, 4
    sets = HeldOut({"all": store}, *rest, reader=_groups)
    found = AnswerMeasures().answers(sets, store, ByteTokenizer(), logits)
    assert found == ([["1867", "It"], ["cat"], []], ["1867", "cat", ""])


def _groups(store, rows):
    return Groups(store, rows.length, rows.slots, keeps_begin=rows.keeps_begin)


def job_of(folder, **fields):
    source = Questions(path=str(folder / "questions.jsonl"))
    data = Data(
        train=(Domain(name="questions", source=source),),
        tokenizer=Bytes(),
        held_out=0.2,
        length=LENGTH,
        batch_size=16,
        rows="groups",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / "run"),
        "steps": 60,
        "model": MODEL,
        "data": data,
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": ChatEvaluation(every=30),
        "checkpoint": Checkpoints(every=30),
    }
    return AnswerQuestions(**(defaults | fields))


def test_it_learns_to_find_the_digit_or_nothing(tmp_path):
    draw = np.random.default_rng(0)
    records = []
    for number in range(240):
        letters = [str(letter) for letter in draw.choice(list("abcdef"), 6)]
        if number % 4:
            letters[draw.integers(6)] = digit = str(draw.integers(10))
            records.append(question("-".join(letters), digit))
        else:
            records.append(question("-".join(letters)))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    job = job_of(tmp_path)
    job.run()
    last = [m for m in read_metrics(job.output) if "exact_match" in m][-1]
    assert last["split"] == "held_out/questions"
    assert last["exact_match"] > 90 and last["unanswerable_exact_match"] > 80
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "exact match" in report


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["x"], "answer_start": [0]}, r"the answer 'x' is not at character 0"),
        ({"text": ["a"], "answer_start": [-1]}, r"the answer 'a' is not at character -1"),
        ({"text": ["a"]}, r"lists 'text' and 'answer_start' of one length"),
        (None, r"lists 'text' and 'answer_start' of one length"),
    ],
)
def test_lines_that_are_wrong_are_named(answers, message, tmp_path):
    record = {"question": "q?", "context": "a b", "answers": answers}
    with pytest.raises(UserError, match=message) as error:
        store_of(tmp_path, [record])
    assert "questions.jsonl" in str(error.value)


def test_settings_that_do_not_fit(tmp_path):
    source = LabelledTexts(path="texts.jsonl")
    data = Data(train=(Domain(name="texts", source=source),), rows="groups")
    with pytest.raises(UserError, match="LabelledTexts has no questions"):
        job_of(tmp_path, data=data)
    with pytest.raises(UserError, match="trains a head of the name 'label' that is a SpanHead"):
        TextSpans().check(TransformerConfig())
    source = Questions(path="questions.jsonl")
    data = Data(train=(Domain(name="questions", source=source),), rows="groups", length=LENGTH)
    adapted = job_of(tmp_path, data=data, model=replace(MODEL, heads=(), lora=LoRA()))
    assert adapted.with_model().model == replace(MODEL, lora=LoRA())
    assert jax.tree.leaves(TextSpans().shapes(2, LENGTH))[0].shape == (2, LENGTH)
