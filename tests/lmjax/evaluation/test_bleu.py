"""BLEU and chrF beside sacrebleu, on random and on real pairs, and what ours refuses."""

import json
import math
import pathlib
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.bleu import bleu_counts, bleu_of, corpus_bleu, sentence_bleu
from lmjax.evaluation.bleu_tokens import CHINESE, bleu_tokens
from lmjax.evaluation.chrf import corpus_chrf, sentence_chrf

sacrebleu = pytest.importorskip("sacrebleu")
from sacrebleu.metrics import BLEU, CHRF  # noqa: E402
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh  # noqa: E402

# Sums of logarithms of shares, in another order.
TOLERANCE = {"rel": 1e-12, "abs": 1e-12}
SMOOTHINGS = [("exp", None), ("floor", None), ("floor", 0.3), ("add-k", None), ("none", None)]
TOKENIZERS = ["13a", "intl", "zh", "char", "none"]
# Marks, digits, blanks, entities, two scripts, and what sacrebleu takes for Chinese or does not.
LETTERS = "abB1 2,.-'\"&;!<>()\n\t今天好。「」，—→é\u3000\U00020000１"
TEXT = st.text(LETTERS, max_size=12) | st.sampled_from(["&quot;a&amp;", "1,234.5-6", "<skipped>x"])
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d."]), max_size=9).map(" ".join)
SHARED = pathlib.Path(__file__).parents[4] / "shared"


def transposed(references):
    """As sacrebleu takes them, `None` where a hypothesis has fewer."""
    most = max(map(len, references))
    return [[one[n] if n < len(one) else None for one in references] for n in range(most)]


def pairs(text):
    return st.lists(
        st.tuples(text, st.lists(text, min_size=1, max_size=3)), min_size=1, max_size=4
    ).map(lambda rows: tuple(map(list, zip(*rows, strict=True))))


@given(TEXT | st.text(max_size=12), st.sampled_from(TOKENIZERS))
@settings(max_examples=150, deadline=None)
@example("a.,5 ..b", "13a")
@example("x\U0001fac0.", "intl")
def test_tokens_are_those_of_sacrebleu(text, tokenizer):
    theirs = BLEU(tokenize=tokenizer).tokenizer
    if tokenizer != "intl" or all(known(letter) for letter in text):
        assert bleu_tokens(text, tokenizer) == theirs(text).split()


def known(letter):
    """Not one that is newer than this Python's Unicode, of which `regex` may know more."""
    import unicodedata

    return unicodedata.category(letter) != "Cn"


def test_chinese_characters_are_those_of_sacrebleu():
    codes = [*range(0xD800), *range(0xE000, 0x11000), *range(0x20000, 0x20010), 0x2F800]
    theirs = [TokenizerZh._is_chinese_char.__wrapped__(chr(code)) for code in codes]
    assert [CHINESE.match(chr(code)) is not None for code in codes] == theirs


@given(
    pairs(TEXT) | pairs(WORDS),
    st.sampled_from(TOKENIZERS),
    st.sampled_from(
        [("exp", None), ("floor", None), ("floor", 0.3), ("add-k", None), ("none", None)]
    ),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_bleu_is_that_of_sacrebleu(rows, tokenizer, smoothing, effective, lowercase, order):
    hypotheses, references = rows
    name, amount = smoothing
    theirs = BLEU(
        tokenize=tokenizer,
        smooth_method=name,
        smooth_value=amount,
        max_ngram_order=order,
        effective_order=effective,
        lowercase=lowercase,
        force=True,
    )
    wanted = theirs.corpus_score(hypotheses, transposed(references))
    counts = bleu_counts(hypotheses, references, tokenizer, lowercase=lowercase, order=order)
    found = bleu_of(counts.sum(0), name, amount, effective)
    assert found.score == pytest.approx(wanted.score, **TOLERANCE)
    assert found.precisions == pytest.approx(wanted.precisions, **TOLERANCE)
    assert found.brevity_penalty == pytest.approx(wanted.bp, **TOLERANCE)
    assert (found.length, found.reference_length) == (wanted.sys_len, wanted.ref_len)


@given(pairs(TEXT) | pairs(WORDS), st.sampled_from(TOKENIZERS))
@settings(max_examples=40, deadline=None)
def test_sentence_bleu_is_that_of_sacrebleu(rows, tokenizer):
    for hypothesis, references in zip(*rows, strict=True):
        wanted = sacrebleu.sentence_bleu(hypothesis, references, tokenize=tokenizer)
        found = sentence_bleu(hypothesis, references, tokenizer)
        assert found.score == pytest.approx(wanted.score, **TOLERANCE)


@given(
    pairs(TEXT) | pairs(WORDS),
    st.integers(1, 6),
    st.integers(0, 2),
    st.sampled_from([1.0, 2.0, 3.0]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_chrf_is_that_of_sacrebleu(rows, characters, words, beta, lowercase, whitespace):
    hypotheses, references = rows
    theirs = CHRF(characters, words, int(beta), lowercase, whitespace)
    wanted = theirs.corpus_score(hypotheses, transposed(references)).score
    mine = {
        "character_order": characters,
        "word_order": words,
        "beta": beta,
        "lowercase": lowercase,
        "whitespace": whitespace,
    }
    assert corpus_chrf(hypotheses, references, **mine) == pytest.approx(wanted, **TOLERANCE)
    first = theirs.sentence_score(hypotheses[0], references[0]).score
    found = sentence_chrf(hypotheses[0], references[0], **mine)
    assert found == pytest.approx(first, **TOLERANCE)


def paragraphs(language):
    """Real parallel text, to the end of each first question: paragraphs in many languages."""
    path = SHARED / "data" / "xquad" / f"xquad.{language}.json.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        data = json.load(file)["data"]
    return [part["context"] for one in data for part in one["paragraphs"]][:60]


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("en", "13a"), ("de", "intl"), ("ru", "13a"), ("zh", "zh"), ("zh", "char"), ("th", "char")],
)
def test_real_texts_are_scored_as_by_sacrebleu(language, tokenizer):
    """Paragraphs of which words are dropped and swapped, beside themselves and their neighbours."""
    texts, random = paragraphs(language), np.random.default_rng(0)
    pieces = [re.findall(r"\w+\W*|\W+", text) for text in texts]
    worse = ["".join(p for p in piece if random.random() < 0.8) for piece in pieces]
    references = [[text, other] for text, other in zip(texts, [*texts[1:], texts[0]], strict=True)]
    wanted = BLEU(tokenize=tokenizer).corpus_score(worse, transposed(references))
    found = corpus_bleu(worse, references, tokenizer)
    assert found.score == pytest.approx(wanted.score, **TOLERANCE) and found.score > 20
    for words in (0, 2):
        wanted = CHRF(word_order=words).corpus_score(worse, transposed(references)).score
        mine = corpus_chrf(worse, references, word_order=words)
        assert mine == pytest.approx(wanted, **TOLERANCE)


def test_a_corpus_is_no_mean_of_sentences():
    hypotheses, references = ["a b c d e", "x y"], [["a b c d e"], ["x z q r s"]]
    sentences = [sentence_bleu(h, r).score for h, r in zip(hypotheses, references, strict=True)]
    assert corpus_bleu(hypotheses, references).score != pytest.approx(np.mean(sentences), rel=0.05)


def test_the_closed_form():
    """One reference, 4 of 5 words right, none missing: by hand."""
    found = corpus_bleu(["a b c d x"], [["a b c d e"]])
    shares = [4 / 5, 3 / 4, 2 / 3, 1 / 2]
    assert found.score == pytest.approx(100 * math.prod(shares) ** 0.25)


def test_chinese_needs_a_tokenizer():
    hypotheses, references = ["今天天气很好"], [["今天天气不好"]]
    assert BLEU().corpus_score(hypotheses, [["今天天气不好"]]).score == 0  # in silence
    for score in (corpus_bleu, bleu_counts):
        with pytest.raises(UserError, match="name a tokenizer, such as zh"):
            score(hypotheses, references)
    with pytest.raises(UserError, match="script without spaces"):
        sentence_bleu(hypotheses[0], references[0])
    assert corpus_bleu(hypotheses, references, "zh").score > 40
    assert corpus_bleu(["今天"], [["today it is fine"]]).score == 0  # the wrong language is wrong


def test_references_that_are_too_short_for_their_order():
    assert BLEU().corpus_score(["yes"], [["yes"]]).score == 0  # perfect, and in silence
    with pytest.raises(UserError, match="longest reference has 1 tokens"):
        corpus_bleu(["yes"], [["yes"]])
    assert corpus_bleu(["yes"], [["yes"]], order=1).score == 100
    assert sentence_bleu("yes", ["yes"]).score == 100


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a", "b", "c"], [["x", "y", "z"]], "as sacrebleu has them"),
        (["a", "b"], [["x"]], "1 lists of references for 2 hypotheses"),
        (["a", "b"], ["x", "y"], "a list of references for each"),
        (["a"], [[]], "hypothesis 0 has no reference"),
        ([], [], "there is no hypothesis"),
    ],
)
def test_references_of_another_shape(hypotheses, references, message):
    for measure in (corpus_bleu, corpus_chrf):
        with pytest.raises(UserError, match=message):
            measure(hypotheses, references)


def test_unknown_settings():
    """Without the checks of types that tests have."""
    with pytest.raises(UserError, match="known are 13a, intl, zh"):
        bleu_tokens.__wrapped__("a b c d", "ja-mecab")
    with pytest.raises(UserError, match="known are exp, floor"):
        bleu_of.__wrapped__(np.ones(10, np.int64), "add")
