"""ROUGE beside rouge-score, on random and on real pairs, and where ours is another on purpose."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.rouge import KINDS, common_lengths, rouge, rouge_tokens

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

SCORERS = {stem: rouge_scorer.RougeScorer(list(KINDS), use_stemmer=stem) for stem in (False, True)}
WORDS = ["a", "b", "the", "cats", "running", "nationally", "dying", "2nd", "café", "GPT-2", "\n"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join) | st.text(max_size=12)
WHOLE = {"rel": 1e-12, "abs": 0}


def same(found, wanted):
    for kind in KINDS:
        theirs = wanted[kind]
        numbers = theirs.precision, theirs.recall, theirs.fmeasure
        assert tuple(found[kind]) == pytest.approx(numbers, **WHOLE), kind


@given(TEXT, TEXT, st.booleans())
@settings(max_examples=100, deadline=None)
@example("b a\na b a", "a b\nb a b", False)
def test_english_is_that_of_rouge_score(summary, reference, stemmed):
    found = rouge(summary, [reference], tokenizer="english", stemmed=stemmed)
    same(found, SCORERS[stemmed].score(reference, summary))


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_the_best_of_several_references(summary, references):
    found = rouge(summary, references, tokenizer="english")
    wanted = SCORERS[False].score_multi(references, summary)
    assert [found[kind].f1 for kind in KINDS] == pytest.approx(
        [wanted[kind].fmeasure for kind in KINDS], **WHOLE
    )


@pytest.mark.parametrize("stemmed", [False, True])
def test_real_texts_are_scored_as_by_rouge_score(stemmed):
    """Python's help of the methods of texts, each beside the next one's, by lines."""
    texts = [
        "\n".join(line.strip() for line in doc.splitlines() if line.strip())
        for value in vars(str).values()
        if (doc := getattr(value, "__doc__", None))
    ]
    assert len(texts) > 40
    for summary, reference in itertools.pairwise(texts[:40]):
        found = rouge(summary, [reference], stemmed=stemmed)
        same(found, SCORERS[stemmed].score(reference, summary))


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
@settings(max_examples=30, deadline=None)
def test_longest_common_words_by_trying_all(one, other):
    parts = [
        {part for n in range(len(given) + 1) for part in itertools.combinations(given, n)}
        for given in (one, other)
    ]
    assert common_lengths(one, other)[-1, -1] == max(map(len, parts[0] & parts[1]))


def test_lines_matter():
    summary, reference = "b c.\na b.", "a b.\nb c."
    apart = rouge(summary, [reference])
    assert apart["rougeLsum"].f1 == 1 and apart["rougeL"].f1 == 0.5
    joined = rouge("b c. a b.", ["a b. b c."])
    assert joined["rougeLsum"] == joined["rougeL"] == apart["rougeL"]


def test_chinese_is_scored_by_characters():
    """rouge-score sees the Latin word alone, or nothing; both are shown, as ours differs."""
    one, other, plain = "今天 GPT2 很好", "明天 GPT2 不好", "今天天气很好"
    theirs = SCORERS[False]
    assert theirs.score(other, one)["rouge1"].fmeasure == 1.0
    assert theirs.score(plain, plain)["rouge1"].fmeasure == 0.0
    with pytest.raises(UserError, match="name the tokenizer, unicode"):
        rouge(plain, [plain])
    assert rouge(plain, [plain], tokenizer="unicode")["rougeL"].f1 == 1.0
    # 天, gpt2 and 好 of five words each.
    assert rouge(one, [other], tokenizer="unicode")["rouge1"].f1 == pytest.approx(3 / 5)
    same(rouge(one, [other], tokenizer="english"), theirs.score(other, one))  # if one insists


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Кот спит, да.", ["кот", "спит", "да"]),
        ("今天GPT-2很好。", ["今", "天", "gpt", "2", "很", "好"]),
        ("Un café, s'il", ["un", "café", "s", "il"]),
        ("ＧＰＴ２　snake_case", ["gpt2", "snake", "case"]),  # wide letters are letters
        ("ภาษา", list("ภาษา")),
    ],
)
def test_words_of_all_scripts(text, words):
    assert rouge_tokens(text, "unicode") == words


def test_accents_of_latin_words_are_no_reason_to_refuse():
    assert rouge("Un café", ["un café noir"])["rouge1"].precision == 1
    with pytest.raises(UserError, match="Кот"):
        rouge("a", ["Кот спит"])


def test_mistakes():
    for references in ([], "text"):
        with pytest.raises(UserError, match="one reference or more"):
            rouge.__wrapped__("a", references)
    with pytest.raises(UserError, match="known are rouge1"):
        rouge.__wrapped__("a", ["a"], ["rouge3"])


def test_stems_need_nltk(monkeypatch):
    import sys

    from lmjax.evaluation import rouge as module

    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    module._stemmer.cache_clear()
    with pytest.raises(UserError, match=r"lmjax\[rouge\]"):
        rouge("running", ["running"], stemmed=True)


def test_long_texts_are_quick_enough():
    """A table of 2,000 times 2,000 words, by rows."""
    words = np.random.default_rng(0).choice(list("abcdefgh"), (2, 2000))
    found = rouge(" ".join(words[0]), [" ".join(words[1])], ["rougeL"])
    assert 0.4 < found["rougeL"].f1 < 0.8
