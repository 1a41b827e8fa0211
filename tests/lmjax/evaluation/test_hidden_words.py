"""Words hidden in sentences, and how many a model that says what it is told to finds again."""

from types import SimpleNamespace

import pytest

from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation.hidden_words import (
    Hidden,
    commonest_word,
    fill_hidden,
    hide_words,
    sentences,
    share_recovered,
    spelt,
)
from lmjax.generation import TextGenerator
from lmjax.generation.fill import Filled

TEXTS = (
    "A title without an end\n\nThe first sentence\nhas two lines. Too short! The second one is the"
    " last of the text, isn't it?",
    "Nothing but numbers 1 2 3 4. The end of the story is not the end.",
)


class Fixed(TextGenerator):
    """Fills each blank with the next of its words."""

    def __init__(self, words):
        filling = SimpleNamespace(names=lambda tokenizer: ["[MASK]"])
        vars(self).update(words=iter(words), tokenizer=None, filling=filling)  # it is frozen

    def fill(self, prompts, sampling, most):
        assert sampling.temperature == 0
        return [Filled(prompt, [next(self.words)]) for prompt in prompts]


def test_sentences_end_and_are_neither_short_nor_long():
    assert list(sentences(TEXTS)) == [
        "The first sentence\nhas two lines.",
        "The second one is the last of the text, isn't it?",
        "Nothing but numbers 1 2 3 4.",
        "The end of the story is not the end.",
    ]
    assert list(sentences(["word " * 30 + "."])) == []


def test_a_whole_word_is_hidden_and_always_the_same():
    hidden = hide_words(TEXTS)
    assert ["".join(sentence) for sentence in hidden] == list(sentences(TEXTS))
    assert hide_words(TEXTS, 2) == hidden[:2]
    for before, word, after in hidden:
        assert word.isalpha() and before.endswith(" ") and not after[:1].isalnum()


def test_the_commonest_word_is_counted_where_words_can_be_hidden():
    # "The" and "the" are two words; what begins a sentence or stands behind a line is not hidden.
    assert commonest_word(TEXTS) == "the"
    assert commonest_word([]) == ""


def test_the_share_is_of_all_sentences(monkeypatch):
    hidden = [Hidden("a ", "b", " c"), Hidden("d ", "e", " f"), Hidden("g ", "h", ".")]
    words = [sentence.word for sentence in hidden]
    monkeypatch.setattr("lmjax.evaluation.hidden_words._fits", lambda *_: True)
    filled = fill_hidden(Fixed(["b", "x", "h"]), hidden)
    assert [text.text for text in filled] == ["a [MASK] c", "d [MASK] f", "g [MASK]."]
    assert share_recovered(filled, words) == pytest.approx(2 / 3)
    # What the context does not hold is not recovered.
    monkeypatch.setattr("lmjax.evaluation.hidden_words._fits", lambda _, p: p[0] != "d")
    filled = fill_hidden(Fixed(["b", "h"]), hidden)
    assert filled[1] is None
    assert share_recovered(filled, words) == pytest.approx(2 / 3)


def test_words_are_compared_as_the_tokens_spell_them(tmp_path):
    pieces = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "##n"
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    uncased = read_tokenizer(tmp_path)
    words = [spelt(uncased, word) for word in ("The", "the", "then", "Thé", "fox")]
    assert words == ["the", "the", "then", "the", None]
    assert [spelt(ByteTokenizer(), word) for word in ("The", "Thé")] == ["The", "Thé"]
    # Nothing is no answer where the word is unknown: a model cannot be right by writing nothing.
    filled = [Filled("", ["the"]), Filled("", ["The"]), None, Filled("", ["the"]), Filled("", [""])]
    assert share_recovered(filled, words) == pytest.approx(2 / 5)
