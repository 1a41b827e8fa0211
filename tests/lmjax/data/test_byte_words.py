"""Tokens of words that are looked up equal those of whole texts."""

import random

import numpy as np
import pytest

from lmjax.data.tokenizers import byte_words
from lmjax.data.tokenizers.base import Corpus
from lmjax.data.tokenizers.subwords import FEW, SentencePieceTokenizer, TrainedBPE

TEXTS = [
    "The quick brown fox, it's 12.5% faster;  two  spaces\tand tab\n\n    indented = f(x[0], -1)\n",
    "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\uff0c\u6807\u70b9\u3002 caf\u00e9 "
    "\u201cquoted\u201d\u2026 \u00e9\u00e8, x\u0301 \U0001f600!\n",
    " \n  \n\n trailing blanks   ",
    "",
    "a" * 100 + " " + "word" * 40 + "\x00\r\n",
]


class Learned(Corpus):
    """Text to learn from."""

    def sample(self, size):
        return iter([text.replace("\x00", "") * 40 for text in TEXTS if text.strip()])

    def everything(self):
        return self.sample(0)


@pytest.fixture(scope="module")
def tokenizer():
    return TrainedBPE(vocab_size=420, coverage=1.0).build(Learned())


def whole(tokenizer, texts):
    """The library's tokens of whole lines."""
    words, tokenizer._words = tokenizer._words, None
    try:
        return tokenizer.encode_batch(texts)
    finally:
        tokenizer._words = words


def drawn(seed):
    """Texts of random pieces, more than are worth looking up."""
    rng = random.Random(seed)
    pieces = [piece for text in TEXTS for piece in text.split(" ")] + [
        " ",
        "  ",
        "\n",
        "1",
        ",",
        "z",
    ]
    return ["".join(rng.choices(pieces, k=rng.randrange(200))) for _ in range(40)]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_those_of_whole_texts(tokenizer, seed, monkeypatch):
    monkeypatch.setattr(byte_words, "TOGETHER", [1 << 15, 97, 7, 1][seed])
    texts = drawn(seed)
    assert tokenizer._words is not None and sum(map(len, texts)) > FEW
    expected = whole(tokenizer, texts)
    for _ in range(2):  # unknown words, and known ones
        assert tokenizer.encode_batch(texts) == expected
    arrays = tokenizer.encode_arrays(texts)
    assert [tokens.tolist() for tokens in arrays] == expected


def test_words_may_want_the_same_slot(tokenizer, monkeypatch):
    monkeypatch.setattr(byte_words, "SLOTS", 4)
    monkeypatch.setattr(byte_words, "MOST_TOKENS", 50)
    small = SentencePieceTokenizer(tokenizer._model, by_line=True)
    for seed in range(3):
        texts = drawn(seed)
        assert small.encode_batch(texts) == whole(small, texts)


def test_texts_that_are_encoded_in_another_way(tokenizer):
    """U+2581 in the text, and more without a blank than the library takes at once."""
    for text in ("a\u2581b " * 2000, "ab" * 40_000):
        assert tokenizer.encode_batch([text]) == whole(tokenizer, [text])


def test_kinds_are_those_that_part_no_piece(tokenizer):
    kinds = byte_words.safe_kinds(tokenizer._model)
    assert kinds is not None and byte_words.safe_kinds(b"nonsense") is None
    for piece in range(260, tokenizer.vocab_size):
        data = tokenizer.token_bytes(piece)
        begins = byte_words._begins(kinds[np.frombuffer(data, np.uint8)], np.zeros(1, np.int64))
        assert begins.sum() == 1, data
