"""What a finished run says: baselines of the source's text, what is withheld, hidden words."""

import dataclasses
import gzip
import json
import random

import pytest

from lmjax.config import config, replace
from lmjax.data import (
    Bytes,
    Data,
    Domain,
    JsonLines,
    TextFiles,
    TokenizerFolder,
    TrainedBPE,
    build_stores,
    prepare,
)
from lmjax.data.documents import Document, Part, Source, is_held_out
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.evaluation.baselines import ByteBigram
from lmjax.evaluation.hidden_words import EXAMPLES, hide_words, recover
from lmjax.evaluation.text_baselines import compare, text_notes, withheld
from lmjax.generation import TextGenerator
from lmjax.generation.fill import BlankInfiller, Filled

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
        vars(self).update(word=word, tokenizer=tokenizer, filling=BlankInfiller())  # it is frozen

    def fill(self, prompts, sampling, most):
        assert sampling.temperature == 0
        return [Filled(prompt.replace("[MASK]", self.word), [self.word]) for prompt in prompts]


def test_hidden_words_of_every_set_with_sentences(prepared, monkeypatch):
    monkeypatch.setattr("lmjax.evaluation.hidden_words._fits", lambda _, p: "number c" not in p)
    rows, samples = recover(Same("begins"), prepared)
    rows = {name: dict(zip(("guess", "model"), values)) for name, *values in rows}
    hidden = {"books": hide_words([BOOK]), "letters": hide_words([LETTER])}
    for name, sentences in hidden.items():
        shares = {
            word: sum(sentence.word == word for sentence in sentences) / len(sentences)
            for word in ("the", "begins")
        }
        found = sum(s.word == "begins" and "number c" not in "".join(s) for s in sentences)
        assert rows[name]["guess"] == pytest.approx(shares["the"])
        assert rows[name]["model"] == pytest.approx(found / len(sentences))
    assert rows.keys() == hidden.keys() and len(hidden["books"]) > EXAMPLES
    shown = [*hidden["books"][:EXAMPLES], *hidden["letters"]]
    shown = [s for s in shown if "number c" not in f"{s.before}[MASK]{s.after}"]
    assert [prompt for prompt, _ in samples] == [
        f"{before}[MASK]{after}" for before, _, after in shown
    ]
    for (_, text), (before, word, after) in zip(samples, shown, strict=True):
        filled, hint = text.removeprefix("\n").split("\n")
        assert filled == f"{before}begins{after}"
        assert f"hidden was: {word};" in hint and "likeliest" in hint


WORDS = ["The", "Cat", "and", "the", "dog", "saw", "Äpfel", "on", "the", "way", "to", "town"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KNOWN = ["the", "cat", "and", "dog", "saw", "apfel", "on", "way", "to", "town", "a"]
TOKENIZERS = {
    "bytes": lambda folder: Bytes(),
    "trained": lambda folder: TrainedBPE(vocab_size=292),
    "uncased": lambda folder: TokenizerFolder(path=str(wordpiece(folder, SPECIAL + KNOWN))),
    "nothing known": lambda folder: TokenizerFolder(path=str(wordpiece(folder, SPECIAL))),
}


def wordpiece(folder, pieces):
    """A BERT's folder."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Documents of the words above, as their tokenizers lose them."""
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    draw = random.Random(0)
    texts = ["  ".join(draw.choices(WORDS, k=12)) for _ in range(200)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return JsonLines(path=str(path))


@pytest.fixture(scope="module", params=TOKENIZERS)
def read_by(lines, request, tmp_path_factory):
    """What a tokenizer makes of them, with text that is held out and a set for evaluation alone."""
    folder = tmp_path_factory.mktemp("prepared")
    data = Data(
        train=(
            Domain(name="lines", source=lines),
            Domain(name="alone", source=replace(lines, on_error="skip"), weight=0),
        ),
        tokenizer=TOKENIZERS[request.param](folder / "tokenizer"),
        held_out=0.2,
        cache=str(folder / "cache"),
    )
    return request.param, prepare(data, folder / "run")


def test_gzip_and_the_bigram_read_the_source_whatever_the_tokens_are(lines, read_by):
    _, prepared = read_by
    documents = list(lines.documents())
    held_out = [d.text.encode() for d in documents if is_held_out(d, 0.2)]
    training = [d.text.encode() for d in documents if not is_held_out(d, 0.2)]
    everything = [d.text.encode() for d in documents]
    rows = compare(prepared, {"lines": 1.5})
    for name, texts in (("lines", held_out), ("alone", everything)):
        size = sum(map(len, texts))
        zipped = 8 * len(gzip.compress(b"".join(texts), 9)) / size
        bigram = ByteBigram().fit(training).bits_per_byte(texts)
        assert rows[name]["gzip -9"] == zipped and rows[name]["byte bigram"] == bigram
    assert rows["lines"]["model"] == 1.5 and "model" not in rows["alone"]


def test_what_the_tokens_do_not_hold_is_said_and_withheld(read_by):
    tokenizer, prepared = read_by
    reasons, told = withheld(prepared), text_notes(prepared)
    if tokenizer in ("bytes", "trained"):
        assert reasons == {} and told == []
        return
    assert reasons.keys() == {"lines", "alone"}
    for reason in reasons.values():
        assert reason.startswith("not comparable: ") and "do not come back" in reason
        assert ("of the tokens are unknown ([UNK])" in reason) == (tokenizer == "nothing known")
    assert [note.split(":")[0] for note in told] == [
        "lines, held-out text",
        "alone, held-out text",
        "lines, training text",
    ]


@config
class NoLetters(Source):
    """A document without a letter."""

    def parts(self):
        return (Part("nothing"),)

    def read(self, part, on_skip):
        yield Document("", "nothing", group="none")


def test_a_set_without_text_has_no_baselines(prepared, tmp_path):
    nothing = build_stores(NoLetters(), ByteTokenizer(), tmp_path / "store")
    prepared = dataclasses.replace(prepared, held_out={"none": nothing["all"]})
    assert compare(prepared, {}) == {"none": {}}
    assert withheld(prepared) == {"none": "not comparable: there is no byte of text"}
