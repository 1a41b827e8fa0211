"""Items found in training data, beside a search of texts in plain Python."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data.sources import JsonLines
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation.contamination import (
    clean_scores,
    contamination,
    contamination_table,
    store_texts,
)
from lmjax.evaluation.requests import Likelihood
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks import Lambada

LONG = " ".join(f"w{n}" for n in range(20))


def grams(text, length):
    words = re.findall(r"\w+", text.lower())
    size = min(length, len(words))
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]


WORDS = st.lists(st.sampled_from("abc"), min_size=0, max_size=8).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, max_size=6))
@settings(max_examples=50, deadline=None)
def test_the_overlap_by_counting(items, documents):
    ngram, shortest = 3, 2
    long = [len(item.split()) >= shortest for item in items]
    if not any(long):
        with pytest.raises(UserError, match="no item has"):
            contamination(items, documents, ngram, shortest)
        return
    found = contamination(items, documents, ngram, shortest, most_documents=2)
    assert found.searched.tolist() == long
    for number, item in enumerate(items):
        if long[number]:
            own = set(grams(item, ngram))
            size = len(next(iter(own)))
            counts = {
                gram: sum(
                    gram in [tuple(doc.split()[at : at + size]) for at in range(len(doc.split()))]
                    for doc in documents
                )
                for gram in own
            }
            leaks = [1 <= count <= 2 for count in counts.values()]
            assert found.overlap[number] == pytest.approx(np.mean(leaks))
            assert found.contaminated[number] == any(leaks)


def test_case_punctuation_and_chinese():
    question = "Which of these 13 words, said the cat, is one of a poem by Li Bai?"
    poem = "床前明月光疑是地上霜举头望明月"
    training = [f"Notes: {question.upper().replace(',', ';')} And more.", f"李白：{poem}。"]
    found = contamination([question, poem, LONG, "too short"], training)
    assert found.contaminated.tolist() == [True, True, False, False]
    assert found.searched.tolist() == [True, True, True, False]
    assert found.overlap[0] == 1


def test_common_phrases_are_no_sign():
    training = [f"{number} {LONG}" for number in range(11)]
    assert not contamination([LONG], training).contaminated[0]
    assert contamination([LONG], training[:10]).contaminated[0]
    assert contamination([LONG], training, most_documents=None).contaminated[0]


def test_a_token_store(tmp_path):
    lines = [json.dumps({"text": text}) for text in (f"before {LONG} after", "another text")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = JsonLines(path=str(tmp_path / "a.jsonl"))
    store = build_stores(source, ByteTokenizer(), tmp_path / "store")["all"]
    found = contamination([LONG, LONG[::-1]], store_texts(store, ByteTokenizer()))
    assert found.contaminated.tolist() == [True, False]


def test_scores_with_and_without():
    found = contamination([LONG, LONG + " x", "short", " ".join("abcdefghij"), LONG[::-1]], [LONG])
    rows = {row.part: row for row in clean_scores(np.array([1.0, 1, 0, 0, 1]), found)}
    assert [rows[part].items for part in ("all", "contaminated", "clean", "not searched")] == [
        *(5, 2, 2, 1)
    ]
    assert rows["contaminated"].score.value == 1 and rows["clean"].score.value == 0.5
    assert rows["not searched"].score is None
    assert rows["all"].score.value == pytest.approx(3 / 5)


def test_settings_that_find_nothing():
    with pytest.raises(UserError, match="from 1 to ngram=5"):
        contamination([LONG], [], ngram=5, shortest=6)


def test_the_table_of_a_model(tmp_path):
    """Two tasks of which one item is in the training text."""
    seen, fresh = "w1 w2 w3 w4 w5 w6 w7 w8 w9", "v1 v2 v3 v4 v5 v6 v7 v8 v9"
    files = {"one": [seen, fresh, fresh.upper() + " x"], "two": ["short", fresh]}
    found = []
    for name, texts in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{text} end"}) + "\n" for text in texts))
        task = Lambada(path=str(path), title=name)
        questions = task.questions()
        answers = [[Likelihood(-1.0, number == 0, 1)] for number in range(len(questions))]
        found.append(TaskResult.of(task, questions, answers))
    table = contamination_table("m", found, ["other text", f"Before. {seen} end. After."])
    rows = {row[0]: row[1:3] for row in table.rows}
    assert rows["one 0-shot acc, all"] == (3, 1 / 3)
    assert rows["one 0-shot acc, contaminated"] == (1, None)  # one item has no interval
    assert rows["one 0-shot acc, clean"] == (2, 0.0)
    assert rows["two 0-shot acc, not searched"] == (1, None)
    assert rows["two 0-shot acc, clean"] == (1, None)
    assert contamination_table("m", found[1:], []) is not None
    [short] = [TaskResult.of(one.task, one.questions[:1], one.answers[:1]) for one in found[1:]]
    assert contamination_table("m", [short], []) is None  # too short to be searched for
