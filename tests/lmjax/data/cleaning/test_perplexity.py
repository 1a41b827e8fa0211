"""Models of n-grams beside a plain implementation of the formula, and the step that uses them."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import JsonLines
from lmjax.data.cleaning.ngram_model import load_ngrams, train_ngrams
from lmjax.data.cleaning.perplexity import Perplexity, load_pieces, part_of
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document
from lmjax.data.tokenizers import Bytes
from lmjax.jobs.train_perplexity import TrainPerplexity

BEGIN = "<s>"


class PlainKneserNey:
    """Interpolated Kneser-Ney by dictionaries, as Chen and Goodman write it."""

    def __init__(self, texts, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        self.counts = {}
        for n in range(1, order + 1):
            raw, before = Counter(), defaultdict(set)
            for text in texts:
                words = (BEGIN, *text)
                for at in range(len(words) - n + 1):
                    gram = words[at : at + n]
                    if gram[-1] == BEGIN:
                        continue
                    raw[gram] += 1
                    if at:
                        before[gram].add(words[at - 1])
            self.counts[n] = {
                gram: count if n == order or gram[0] == BEGIN else len(before[gram])
                for gram, count in raw.items()
            }

    def probability(self, word, context):
        n = len(context) + 1
        below = 1 / self.vocab_size if n == 1 else self.probability(word, context[1:])
        values = Counter(self.counts[n].values())
        once, twice = values[1], values[2]
        discount = once / (once + 2 * twice) if once and twice else 0.5
        own = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == context}
        if not own:
            return below
        total = sum(own.values())
        share = max(own.get((*context, word), 0) - discount, 0) / total
        return share + discount * len(own) / total * below

    def log_probabilities(self, text):
        words = (BEGIN, *text)
        return [
            math.log(self.probability(words[at], words[max(0, at - self.order + 1) : at]))
            for at in range(1, len(words))
        ]


texts = st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(1, 4), st.lists(st.integers(0, 6), max_size=10))
def test_probabilities_are_those_of_the_formula(learned, order, scored):
    if not any(learned):
        with pytest.raises(UserError, match="no text"):
            train_ngrams(learned, 7, order)
        return
    model, plain = train_ngrams(learned, 7, order), PlainKneserNey(learned, 7, order)
    # Kept in single precision: six digits of a logarithm.
    for text in (scored, learned[0]):
        expected = plain.log_probabilities(text)
        np.testing.assert_allclose(model.log_probabilities(text), expected, atol=2e-5)


@pytest.mark.parametrize("least", [1, 2])
def test_probabilities_of_all_tokens_make_one(least):
    rng = random.Random(0)
    learned = [[rng.randrange(6) for _ in range(20)] for _ in range(10)]
    model = train_ngrams(learned, 8, 3, least)
    for context in ([], [1], [1, 2], [7, 7], learned[0][:5]):
        total = sum(np.exp(model.log_probabilities([*context, word])[-1]) for word in range(8))
        assert total == pytest.approx(1, abs=1e-5)
    assert model.perplexity([]) == float("inf")


def test_a_model_is_saved_and_read(tmp_path):
    model = train_ngrams([[0, 1, 2, 0, 1]], 4, 3)._replace(quantiles=np.array([1.0, 3.0, 5.0]))
    model.save(tmp_path / "m.npz")
    again = load_ngrams(tmp_path / "m.npz")
    expected = model.log_probabilities([0, 1, 3])
    np.testing.assert_array_equal(again.log_probabilities([0, 1, 3]), expected)
    assert [again.quantile(value) for value in (0.0, 1.0, 2.0, 4.0, 9.0)] == [0, 0, 0.25, 0.75, 1]
    (tmp_path / "m.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="no model of n-grams"):
        load_ngrams(tmp_path / "m.npz")


def sentences(words, count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=30)) + "." for _ in range(count)]


ENGLISH = ["the", "river", "had", "frozen", "and", "they", "walked", "over", "it", "in", "May"]
NOISE = ["xq", "zzk", "0x1f", "vvw", "qpj", "}{", "kkj"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    mixed = sentences(ENGLISH, 30, 1) + sentences([*ENGLISH, *NOISE], 30, 2)
    mixed += sentences(NOISE, 30, 3)
    for name, some in (("good", sentences(ENGLISH, 200, 0)), ("pages", mixed)):
        lines = (json.dumps({"text": text}) for text in some)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    job = TrainPerplexity(
        output=str(folder / "en"),
        texts=(JsonLines(path=str(folder / "good.jsonl")),),
        compared=(JsonLines(path=str(folder / "pages.jsonl")),),
        tokenizer=Bytes(),
        order=4,
    )
    job.run()
    job.run()  # finds it done
    return folder


def test_the_parts_are_thirds_of_the_compared_documents(trained):
    tables = json.loads((trained / "en" / "results.json").read_text())["tables"]
    rows = {row[0]: row[1:] for row in tables[0]["rows"]}
    assert all(abs(rows[name][0] - 30) <= 2 for name in ("head", "middle", "tail"))
    assert rows["head"][1] < rows["middle"][1] < rows["tail"][1]
    assert [part_of(share) for share in (0.0, 0.34, 0.7, 1.0)] == ["head", "middle", "tail", "tail"]


def test_the_step_keeps_a_band(trained):
    step = Perplexity(models=f"{trained}/{{}}", languages=("en",), most_quantile=2 / 3)
    about = {"language": "en"}
    good, noise = (
        step(Document(sentences(words, 1, 9)[0], "d", metadata=about)) for words in (ENGLISH, NOISE)
    )
    assert good.metadata["perplexity_part"] == "head" and good.metadata["language"] == "en"
    assert isinstance(noise, Dropped) and noise.reason == "the perplexity is high"
    lower = replace(step, least_quantile=0.5)
    assert lower(Document(good.text, "d", metadata=about)).reason == "the perplexity is low"
    german = Document("Der Ausschuss", "d", metadata={"language": "de"})
    assert step(german) is german
    assert replace(step, others="drop")(german).measured == "de"
    assert load_pieces(f"{trained}/en").perplexity("") == float("inf")
    assert replace(step, field="")(Document(good.text, "d")).metadata is None


def test_bands_that_cannot_be_meant(trained):
    step = Perplexity(models=f"{trained}/{{}}", languages=("en",))
    with pytest.raises(UserError, match="must rise from 0 to 1"):
        replace(step, least_quantile=0.7, most_quantile=0.5).validate()
    with pytest.raises(UserError, match="has no "):
        replace(step, models="m", languages=("en", "de")).validate()
    missing = replace(step, languages=("de",))
    with pytest.raises(UserError, match="no model of perplexity"):
        missing(Document("Das", "d", metadata={"language": "de"}))
