"""SentencePiece's normalisation of characters beside its own program, as the library does it."""

import functools
import io
import json

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from lmjax.interop.charsmap import Inexpressible, normalizing_steps, read_table
from tests.lmjax.data.real_strings import real_strings

tokenizers = pytest.importorskip("tokenizers", reason="needs pip install 'lmjax[tokenizers]'")
RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")
# What meets in texts: letters and marks of many scripts, composed or not, and what is mapped.
RANGES = (
    *((0x00, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x45F), (0x591, 0x5F4)),
    *((0x610, 0x6D3), (0x900, 0x97F), (0xB80, 0xBFF), (0xE01, 0xE5B), (0x1100, 0x11C2)),
    *((0x1E00, 0x1EFF), (0x1F00, 0x1F7D), (0x2000, 0x206F), (0x2100, 0x214F), (0x2460, 0x2473)),
    *((0x3000, 0x30FF), (0x3131, 0x318E), (0x4E00, 0x4E40), (0xAC00, 0xAD00), (0xFB00, 0xFB4F)),
    *((0xFE00, 0xFE0F), (0xFF01, 0xFFDC), (0x1D400, 0x1D433), (0x1F3FB, 0x1F466)),
)
CHARACTERS = "".join(
    chr(code) for first, last in RANGES for code in range(first, last + 1) if code not in (0xAD,)
)


@functools.cache
def charsmap(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text"] * 9),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=3,
        **settings,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    return proto.normalizer_spec.precompiled_charsmap


@functools.cache
def library(steps):
    data = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    data["normalizer"] = {"type": "Sequence", "normalizers": json.loads(steps)}
    return tokenizers.Tokenizer.from_str(json.dumps(data)).normalizer.normalize_str


@functools.cache
def pair(rule):
    """Their normalisation and ours."""
    theirs = sentencepiece.SentencePieceNormalizer(
        rule_name=rule,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        escape_whitespaces=False,
    )
    steps = normalizing_steps(charsmap(normalization_rule_name=rule))
    return theirs.normalize, library(json.dumps(steps))


@pytest.mark.parametrize("rule", RULES)
def test_real_texts_are_normalised_as_by_sentencepiece(rule):
    theirs, ours = pair(rule)
    for text in real_strings()[RULES.index(rule) :: len(RULES)]:
        assert ours(text) == theirs(text), text


@pytest.mark.parametrize("rule", RULES)
def test_every_string_of_the_table_becomes_what_it_says(rule):
    """Characters alone, and those strings whose characters the library's Unicode has."""
    _, ours = pair(rule)
    table = read_table(charsmap(normalization_rule_name=rule))
    single = [source for source in table if len(source) == 1 and source != "\0"]
    several = [source for source in table if len(source) > 1 and max(source) < "\ua7f0"]
    assert len(single) > 4900 and len(several) > 10_000
    for source in (*single, *several[::20]):
        assert ours(source) == table[source], ascii(source)


@pytest.mark.parametrize("rule", RULES)
@given(st.text(st.sampled_from(CHARACTERS)))
@example("\r\n\r\na\r\n")
@example("العَرَبِيَّة בְּרֵאשִׁית a\u0302\u0323 a\u0323\u0302 \u0301e\u0301\u0327")
@example("\uac00\u11a8 \uac00\u3136 Y\u0e33")
@example("ｶﾞ ハ\u309a 각 \u1100\u1161\u11a8 ㄱㅏ ﾞ A\u200d\ufe0f™\ufe0f ～~ ＡÅ\u0338")
def test_any_text_is_normalised_as_by_sentencepiece(rule, text):
    theirs, ours = pair(rule)
    assert ours(text) == theirs(text)


def test_strings_that_are_to_stay_do(tmp_path):
    """User-defined pieces: SentencePiece itself keeps them as they are."""
    steps = normalizing_steps(charsmap(normalization_rule_name="nmt_nfkc"), ["\n", "①", "ab"])
    assert library(json.dumps(steps))("a\n①②\t\nａｂ") == "a\n①2 \nab"


def rules(tmp_path, lines):
    """A table of one's own: code points, a tab, and what they become."""
    file = tmp_path / "rules.tsv"
    file.write_text(
        "".join(
            "\t".join(" ".join(f"{ord(c):X}" for c in side) for side in line) + "\n"
            for line in lines
        )
    )
    return charsmap(normalization_rule_tsv=str(file))


def test_a_table_of_one_s_own_for_characters(tmp_path):
    """No mark is lost behind a character that is replaced, and nothing is composed."""
    data = rules(tmp_path, [("ä", "ae"), ("ß", "ss"), ("A", "a")])
    ours = library(json.dumps(normalizing_steps(data)))
    assert ours("Äpfel, Maß, ä\u0301, A\u0301, e\u0301, ＡＢ, A\u200d") == (
        "Äpfel, Mass, ae\u0301, a\u0301, e\u0301, ＡＢ, a\u200d"
    )


def test_a_table_of_one_s_own_for_words_is_refused(tmp_path):
    with pytest.raises(Inexpressible, match="rules of its own for several characters"):
        normalizing_steps(rules(tmp_path, [("abc", "x"), ("A", "a")]))


def test_no_table_changes_nothing():
    assert normalizing_steps(b"") == [] and read_table(b"") == {}
