"""Tokenizers give every text back exactly, are made the same twice, and say what is wrong."""

import itertools
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, config
from lmjax.data.tokenizers import (
    Bytes,
    ByteTokenizer,
    Characters,
    Corpus,
    load_tokenizer,
    token_type,
)
from lmjax.data.tokenizers.subwords import LONGEST, SentencePiece, TrainedBPE, split_sentences

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "漢字",
    "and",
    "émigrés",
    "watch",
]
TEXT = [
    "".join(
        f"{'    ' * (n % 3)}def {WORDS[n % 11]}_{n}(x):\n\treturn {WORDS[n % 7]}  # {n}\n\n"
        for n in range(start, start + 150)
    )
    for start in range(0, 900, 150)
]
HARD = [
    "",
    " ",
    "  leading, trailing  ",
    "\n\n\t\t \n",
    "\r\n\x00\x07\x7f\x1b[0m",
    "\u2581 and \u2581\u2581",  # how SentencePiece writes spaces
    "<|endoftext|><s></s><unk><0x0A>\u2047",  # names of special tokens
    "漢字かな交じり文、한국어",
    "😀👩‍👩‍👧‍👦🇩🇪",
    "e\u0301 \ufb01 \u00a0\u2028\ufeff",  # what normalisation would change
    "x" * 300 + " " * 300,
]


class Texts(Corpus):
    def __init__(self, texts):
        self.texts = texts

    def sample(self, size):
        return iter(self.texts)

    def everything(self):
        return iter(self.texts)


CORPUS = Texts(TEXT)
BPE = TrainedBPE(vocab_size=400).build(CORPUS)
ALL = [BPE, Bytes().build(CORPUS), Characters().build(Texts([*TEXT, *HARD]))]


@pytest.mark.parametrize("tokenizer", ALL[:2], ids=lambda tokenizer: tokenizer.kind)
@settings(max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="\u2581")
@example(text=" \u2581 \n\u2581")
def test_any_text_comes_back_exactly(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.end not in tokens


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda tokenizer: tokenizer.kind)
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back_exactly(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda tokenizer: tokenizer.kind)
def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.begin, loaded.end) == (
        tokenizer.vocab_size,
        tokenizer.begin,
        tokenizer.end,
    )
    assert loaded.encode_batch(TEXT) == tokenizer.encode_batch(TEXT)
    assert loaded.token_bytes(loaded.end) == b""
    assert loaded.decode([loaded.end]) == ""


def test_several_may_save_one_folder_at_once(tmp_path):
    """And whoever reads it then finds all of a tokenizer, as in a cache without locks."""

    def save_and_load(_):
        for _ in range(20):
            BPE.save(tmp_path)
            assert load_tokenizer(tmp_path).fingerprint == BPE.fingerprint

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save_and_load, range(4)))
    assert len(list(tmp_path.iterdir())) == 1 + len(BPE.files())


def test_batches_are_encoded_like_single_texts():
    for tokenizer in ALL:
        texts = [*HARD, *TEXT]
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic_and_follows_the_text():
    assert TrainedBPE(vocab_size=400).build(CORPUS).fingerprint == BPE.fingerprint
    assert TrainedBPE(vocab_size=400).build(Texts(TEXT[:4])).fingerprint != BPE.fingerprint


def test_encoding_by_line_is_what_sentencepiece_does_with_the_whole():
    whole = sentencepiece.SentencePieceProcessor(model_proto=BPE.files()["sentencepiece.model"])
    for text in TEXT:
        assert BPE.encode(text) == whole.encode(text)
    long = "  quick brown   fox " * (LONGEST // 10)  # one line, cut before spaces
    assert BPE.encode(long) == whole.encode(long)
    assert BPE.decode(BPE.encode("x" * (LONGEST + 9))) == "x" * (LONGEST + 9)


def test_trained_bpe_has_the_promised_vocabulary():
    assert BPE.vocab_size == 400
    assert BPE.begin == BPE.end == 1
    assert sum(map(len, BPE.encode_batch(TEXT))) < 0.6 * sum(map(len, TEXT))
    assert BPE.decode(BPE.encode("    return")[:1]) == "    "  # a run of spaces is one token


def test_long_lines_are_learned_from_too():
    """Whole books are one line, and the trainer itself passes over lines above 16 KiB."""
    draw = random.Random(1)
    sentence = "because the reader should understand everything without another explanation"
    spaced = " ".join(draw.choices(sentence.split(), k=4000))
    book = "".join(draw.choices("知之為不是也學而時習", k=9000))  # without spaces
    tokenizer = TrainedBPE(vocab_size=360).build(Texts([spaced, book, "xq zj\n" * 30]))
    assert len(tokenizer.encode(" because the reader should understand everything")) <= 7
    assert len(tokenizer.encode("知之學而")) <= 4  # characters that are tokens, not bytes
    marked = [line + " \u2585 done" for line in spaced.split(" because")]
    tokenizer = TrainedBPE(vocab_size=330).build(Texts(["\n".join(marked)]))
    assert len(tokenizer.encode(" should understand everything")) <= 4


@given(
    st.lists(st.text(" \n\tab\u2585é漢", min_size=1), min_size=1, max_size=5), st.integers(1, 5000)
)
@example(["a b"], 5000)
@example(["漢"], 5000)
@example([" "], 5000)
def test_the_trainer_gets_all_of_a_text_in_lines_that_it_reads(parts, times):
    text = "".join(parts) * times
    lines = list(split_sentences(iter([text])))
    assert "".join(lines) == re.sub("[\n\t\u2585]", "", text)
    assert all(0 < len(line.encode("utf-8")) <= 1 << 14 for line in lines)
    # Where a line is cut that has spaces, it is cut before one.
    rest = iter(lines)
    for whole in filter(None, re.split("[\n\t\u2585]", text)):
        cuts = [next(rest)]
        while len("".join(cuts)) < len(whole):
            cuts.append(next(rest))
        for before, behind in itertools.pairwise(cuts):
            assert behind.startswith(" ") or not re.search("[^ ] ", before[1:]) or " " not in before


def test_bpe_that_cannot_be_trained():
    with pytest.raises(UserError, match=r"too small for vocab_size=5000; it gives at most \d+"):
        TrainedBPE(vocab_size=5000).build(Texts(["ab ab ab abc"]))
    with pytest.raises(UserError, match="vocab_size=262"):
        TrainedBPE(vocab_size=262).build(CORPUS)
    with pytest.raises(UserError, match="above 260"):
        TrainedBPE(vocab_size=100)
    with pytest.raises(UserError):
        TrainedBPE(vocab_size=300).build(Texts([]))


def test_existing_sentencepiece_model(tmp_path):
    """A model made like LLaMA's: a space is put before the text, begin and end differ."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXT).split("\n")),
        model_prefix=str(tmp_path / "other"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    tokenizer = SentencePiece(path=str(tmp_path / "other.model")).build(CORPUS)
    assert (tokenizer.begin, tokenizer.end) == (1, 2)
    for text in (*TEXT, *HARD):
        if "\u2581" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "other.model"))
    assert tokenizer.encode(TEXT[0]) == whole.encode(TEXT[0])
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").decode(tokenizer.encode(" a")) == " a"


def test_characters_are_those_of_the_corpus():
    tokenizer = Characters().build(Texts(["hello", "wörld"]))
    assert tokenizer.vocab_size == 9  # d e h l o r w ö and the separator
    assert tokenizer.encode("deh") == [0, 1, 2]
    with pytest.raises(UserError, match="'x' is not one of the 8"):
        tokenizer.encode("x")


def test_folders_that_hold_no_good_tokenizer(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    model = tmp_path / "sentencepiece.model"
    data = model.read_bytes()
    model.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"damaged|changed"):
        load_tokenizer(tmp_path)
    model.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"kind": "os.system"}))
    with pytest.raises(UserError, match=r"known are bytes, characters, .*sentencepiece"):
        load_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        SentencePiece(path="nowhere.model").build(CORPUS)
    model.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePiece(path=str(model)).build(CORPUS)


def test_tokenizers_of_ones_own_are_read_back_by_their_kind(tmp_path):
    """A class that inherits its kind would be read as another, so it is not saved."""

    class Nameless(ByteTokenizer):
        def encode_batch(self, texts):
            return super().encode_batch([text.upper() for text in texts])

    class Upper(Nameless):
        kind = "upper-case bytes"

    with pytest.raises(UserError, match="Nameless cannot be saved: its kind='bytes' is ByteTok"):
        Nameless().save(tmp_path / "nameless")
    assert not (tmp_path / "nameless").exists()
    Upper().save(tmp_path / "upper")
    read = load_tokenizer(tmp_path / "upper")
    assert type(read) is Upper and read.decode(read.encode("the end")) == "THE END"
    with pytest.raises(TypeError, match="Other: the kind 'bytes' is ByteTokenizer's"):
        type("Other", (Nameless,), {"kind": "bytes"})


def test_a_config_that_inherits_is_no_origin_of_the_same_tokenizer():
    """Or else tokens that are cached for the one would be taken for the other."""

    @config
    class UpperBytes(Bytes):
        pass

    assert Bytes().origin() == "bytes" and UpperBytes().origin() is None


def test_token_type():
    assert token_type(65536).itemsize == 2 and token_type(65537).itemsize == 4
