"""SQuAD's measures by both rules, and the best span beside a search of all."""

import itertools
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.span_measures import (
    answer_f1,
    answer_scores,
    best_span,
    exact_match,
    normalized_answer,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an Apple a day", "apple day"),
        ("theatre", "theatre"),
        ("A.B. the-end", "ab theend"),  # punctuation goes before articles are looked for
        ("the", ""),
        ("«Été»", "«été»"),  # punctuation of ASCII alone
    ],
)
def test_normalization(text, expected):
    assert normalized_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "version", "match", "f1"),
    [
        ("the cat", ["cat"], "1.1", 1, 1),
        ("black cat", ["cat", "dog"], "1.1", 0, 2 / 3),
        ("cat cat", ["cat"], "1.1", 0, 2 / 3),  # a word counts as often as both have it
        ("", ["cat"], "1.1", 0, 0),
        ("a", ["the"], "1.1", 1, 0),  # both are empty: equal, but no word is shared
        ("a", ["the"], "2.0", 1, 1),
        ("", [], "2.0", 1, 1),
        ("cat", [], "2.0", 0, 0),
        ("", ["cat"], "2.0", 0, 0),
        ("", ["the", "cat"], "2.0", 0, 0),  # empty answers do not count beside others
    ],
)
def test_both_rules(prediction, answers, version, match, f1):
    assert exact_match(prediction, answers, version) == match
    assert answer_f1(prediction, answers, version) == pytest.approx(f1)


def test_a_question_without_answers_is_none_of_version_1():
    with pytest.raises(UserError, match=r"version 2\.0"):
        answer_f1("cat", [])


WORDS = st.lists(st.sampled_from(["the", "a", "Cat", "dog.", "!", "sat"]), max_size=5)


@settings(max_examples=200)
@given(WORDS, WORDS, st.sampled_from(["1.1", "2.0"]))
def test_f1_is_that_of_precision_and_recall(prediction, answer, version):
    """By taking words away one by one; the formula of the official programs."""
    found, wanted = (
        [w.strip(string.punctuation).lower() for w in words if w not in ("the", "a", "!")]
        for words in (prediction, answer)
    )
    left, shared = list(wanted), 0
    for word in found:
        if word in left:
            left.remove(word)
            shared += 1
    expected = 0.0
    if shared:
        precision, recall = shared / len(found), shared / len(wanted)
        expected = 2 * precision * recall / (precision + recall)
    elif version == "2.0" and not found and not wanted:
        expected = 1.0
    texts = " ".join(prediction), " ".join(answer)
    assert answer_f1(texts[0], [texts[1]], version) == pytest.approx(expected)
    assert exact_match(texts[0], [texts[1]], version) == (found == wanted)


def test_means_in_percent():
    predictions = ["cat", "a big dog", "", "bird"]
    answers = [["the cat"], ["dog", "small dog"], [], []]
    assert answer_scores(predictions[:2], answers[:2]) == {
        "exact_match": 50.0,
        "f1": pytest.approx(100 * (1 + 2 / 3) / 2),
    }
    scores = answer_scores(predictions, answers, "2.0")
    assert scores["exact_match"] == 50 and scores["f1"] == pytest.approx(100 * (2 + 2 / 3) / 4)
    assert scores["answerable_exact_match"] == 50 and scores["unanswerable_f1"] == 50


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_the_best_span_is_the_best_of_all(seed, size, longest):
    draw = np.random.default_rng(seed)
    starts, ends = draw.normal(size=(2, size))
    allowed = draw.random(size) < 0.7
    spans = [
        (starts[i] + ends[j], i, j)
        for i, j in itertools.product(range(size), repeat=2)
        if allowed[i] and allowed[j] and i <= j < i + longest
    ]
    if not spans:
        with pytest.raises(UserError, match="no token"):
            best_span(starts, ends, allowed, longest=longest)
        return
    found = best_span(starts, ends, allowed, longest=longest)
    score, start, end = max(spans)
    assert (found.start, found.end) == (start, end) and found.score == pytest.approx(score)
    assert found.margin == pytest.approx(score - starts[0] - ends[0])
