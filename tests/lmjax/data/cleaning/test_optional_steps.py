"""Steps that no recipe has: emoji as words, spelling, the order of sentences."""

from __future__ import annotations

import pytest

from lmjax.config import UserError
from lmjax.data.cleaning.ngram_model import train_ngrams
from lmjax.data.cleaning.optional_steps import (
    EmojiToWords,
    SentenceOrder,
    SpellingCorrection,
    one_edit,
)
from lmjax.data.cleaning.perplexity import MODEL, TOKENIZER
from lmjax.data.documents import Document
from lmjax.data.tokenizers.base import ByteTokenizer


def changed(step, text):
    return step(Document(text, "d")).text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("good \U0001f600!", "good :grinning face:!"),
        ("\u2764\ufe0f", ":heavy black heart:"),
        ("\U0001f44d\U0001f3fd ok", ":thumbs up sign: ok"),
        ("no emoji → here ©", "no emoji → here ©"),
    ],
)
def test_emoji_become_words(text, expected):
    assert changed(EmojiToWords(), text) == expected
    with pytest.raises(UserError, match="has no"):
        EmojiToWords(form="x").validate()


def test_spelling(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("believe 5000\nrelieve 200\nchief 300\nrare 5\n")
    step = SpellingCorrection(words=str(path))
    assert changed(step, "I beleive the cheif, Beleive.") == "I believe the chief, Beleive."
    assert changed(step, "believ bellieve belieze belive") == "believe believe believe believe"
    assert changed(step, "xyzzy rarer relieve") == "xyzzy rarer relieve"
    document = Document("right chief", "d")
    assert step(document) is document
    assert {"ab", "b", "ba", "abx"} <= set(one_edit("ab")) | {"ab"}
    path.write_text("word\n")
    with pytest.raises(UserError, match="line 1: give a word and its count"):
        changed(SpellingCorrection(words=f"{tmp_path}/./words.txt"), "x")


def test_sentences_find_their_order(tmp_path):
    right = "First we eat. Then we sleep. Last we go."
    tokenizer = ByteTokenizer()
    model = train_ngrams([tokenizer.encode(right)] * 20, tokenizer.vocab_size, 6)
    model.save(tmp_path / MODEL)
    tokenizer.save(tmp_path / TOKENIZER)
    step = SentenceOrder(model=str(tmp_path))
    assert changed(step, "Then we sleep. First we eat. Last we go.\nOne.") == f"{right}\nOne."
    document = Document(f"{right}\n\n  x", "d")
    assert step(document) is document
