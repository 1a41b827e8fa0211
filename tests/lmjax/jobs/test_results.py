"""What a finished run says of hidden words: shares by held-out set, and sentences to look at."""

import pytest

from lmjax.data import Bytes, Data, Domain, TextFiles, prepare
from lmjax.data.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation.recovered_words import hide_words
from lmjax.generation import TextGenerator
from lmjax.generation.fill import BlankFilling, Filled
from lmjax.jobs.results import EXAMPLES, recover

BOOK = " ".join(f"Here the chapter number {word} begins anew." for word in "abcde")
LETTER = "It is the one letter that was kept here."


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Books that are trained on and held out, and two sets that are evaluated alone."""
    folder = tmp_path_factory.mktemp("texts")
    texts = {"read": "She read the book, and the other one, to the end.", "books": BOOK}
    for name, text in (texts | {"letters": LETTER, "tables": "1 2 3"}).items():
        (folder / f"{name}.txt").write_text(text)
    source = {path.stem: TextFiles(path=str(path)) for path in folder.iterdir()}
    data = Data(
        train=(
            Domain(name="books", source=source["read"], evaluation=source["books"]),
            Domain(name="letters", source=source["letters"], weight=0),
            Domain(name="tables", source=source["tables"], weight=0),
        ),
        tokenizer=Bytes(),
        cache=str(folder / "cache"),
    )
    return prepare(data, folder / "run")


class Same(TextGenerator):
    """Writes one word into every blank, and is asked for nothing else than the likeliest one."""

    def __init__(self, word):
        tokenizer = ExtendedTokenizer(ByteTokenizer(), ("[MASK]",))
        vars(self).update(word=word, tokenizer=tokenizer, filling=BlankFilling())  # it is frozen

    def fill(self, prompts, sampling, most):
        assert sampling.temperature == 0
        return [Filled(prompt.replace("[MASK]", self.word), [self.word]) for prompt in prompts]


def test_hidden_words_of_every_set_with_sentences(prepared, monkeypatch):
    monkeypatch.setattr("lmjax.evaluation.recovered_words._fits", lambda _, p: "number c" not in p)
    rows, samples = recover(Same("begins"), prepared)
    hidden = {"books": hide_words([BOOK]), "letters": hide_words([LETTER])}
    for name, sentences in hidden.items():
        shares = {
            word: sum(sentence.word == word for sentence in sentences) / len(sentences)
            for word in ("the", "begins")
        }
        found = sum(s.word == "begins" and "number c" not in "".join(s) for s in sentences)
        assert rows[name]["unigram guess"] == pytest.approx(shares["the"])
        assert rows[name]["model"] == pytest.approx(found / len(sentences))
    assert rows.keys() == hidden.keys() and len(hidden["books"]) > EXAMPLES
    shown = [*hidden["books"][:EXAMPLES], *hidden["letters"]]
    shown = [s for s in shown if "number c" not in f"{s.before}[MASK]{s.after}"]
    assert [sample["prompt"] for sample in samples] == [
        f"{before}[MASK]{after}" for before, _, after in shown
    ]
    for sample, (before, word, after) in zip(samples, shown, strict=True):
        filled, hint = sample["text"].removeprefix("\n").split("\n")
        assert filled == f"{before}begins{after}"
        assert f"hidden was: {word};" in hint and "likeliest" in hint


def test_a_model_that_continues_texts_has_no_blanks(prepared):
    generator = Same("begins")
    vars(generator).update(filling=None)
    assert recover(generator, prepared) == ({}, [])
