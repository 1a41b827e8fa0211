"""The classifier of quality: it separates, and GPT-3's rule keeps what it should."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data import EmbeddedCorpus, JsonLines, TextFiles
from lmjax.data.cleaning import DirtyPages, quality
from lmjax.data.cleaning.quality import (
    QualityFilter,
    QualityModel,
    area_under_curve,
    keep_probability,
    load_quality,
    train_quality,
)
from lmjax.data.documents import Document, is_held_out
from lmjax.jobs.train_quality import TrainQuality

ARTICLES = Path(__file__).parents[5] / "shared" / "data" / "wikitext2"
SENTENCE = "the river had frozen and they walked over it in the morning of a day to come"
GOOD = tuple(SENTENCE.split())
ADVERT = "click here buy now best price login cart free offer terms the a of to"
RAW = tuple(ADVERT.split())


def texts(words, count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randrange(20, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    return train_quality(texts(GOOD, 60, 0), texts(RAW, 200, 1), bits=12)


def test_good_texts_have_higher_scores_than_raw_ones(model):
    good, raw = ([model.score(t) for t in texts(w, 50, 2)] for w in (GOOD, RAW))
    assert area_under_curve(good, raw) >= 0.99
    assert np.mean(good) > 0.9 and np.mean(raw) < 0.1
    assert 0 <= model.score("") <= 1


def test_the_order_of_learning_is_the_seeds(model):
    again = train_quality(texts(GOOD, 60, 0), texts(RAW, 200, 1), bits=12)
    other = train_quality(texts(GOOD, 60, 0), texts(RAW, 200, 1), bits=12, seed=1)
    np.testing.assert_array_equal(again.weights, model.weights)
    assert not np.array_equal(other.weights, model.weights)
    with pytest.raises(UserError, match="0 good and 1 raw"):
        train_quality([], ["one"])


def test_the_keep_probability_is_that_of_numpys_pareto():
    """np.random.pareto(9) > 1 - score, by 400,000 draws: to 0.003, four standard deviations."""
    draws = np.random.default_rng(0).pareto(9, 400_000)
    scores = np.array([0.0, 0.3, 0.5, 0.8, 0.9, 1.0])
    expected = [(draws > 1 - score).mean() for score in scores]
    np.testing.assert_allclose(keep_probability(scores), expected, atol=3e-3)
    assert keep_probability(0.9) == pytest.approx(0.424, abs=5e-4)
    assert keep_probability(1.0) == 1


@pytest.mark.parametrize("score", [0.5, 0.9])
def test_the_rule_keeps_its_share_of_documents(monkeypatch, score):
    class Constant:
        def score(self, text):
            return score

    monkeypatch.setattr(quality, "_model", lambda path: Constant())
    step = QualityFilter(model="m")
    kept = [step(Document(f"text {n}", "d")) for n in range(20_000)]
    share = sum(isinstance(one, Document) for one in kept) / len(kept)
    # Four standard deviations.
    expected = keep_probability(score)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(kept))
    # It depends on the text alone.
    assert kept[:100] == [step(Document(f"text {n}", "d")) for n in range(100)]


def test_a_model_is_saved_and_read(model, tmp_path):
    model.save(tmp_path / "m.npz")
    again = load_quality(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.weights, model.weights)
    assert again.bias == model.bias
    step = QualityFilter(model=str(tmp_path / "m.npz"), rule="threshold")
    (good,), (raw,) = texts(GOOD, 1, 3), texts(RAW, 1, 3)
    assert step(Document(good, "d")).metadata["quality"] > 0.5
    assert step(Document(raw, "d")).reason == "the score of its quality is low"
    (tmp_path / "m.npz").write_bytes(b"none")
    with pytest.raises(UserError, match="is no model of quality"):
        load_quality(tmp_path / "m.npz")


@given(good=st.lists(st.integers(0, 5), min_size=1), raw=st.lists(st.integers(0, 5), min_size=1))
def test_the_area_is_the_share_of_pairs_in_order(good, raw):
    pairs = [(g > r) + 0.5 * (g == r) for g in good for r in raw]
    assert area_under_curve([*map(float, good)], [*map(float, raw)]) == pytest.approx(
        sum(pairs) / len(pairs)
    )


def test_the_job_trains_and_reports(tmp_path):
    for name, words, count in (("good", GOOD, 120), ("raw", RAW, 300)):
        lines = [json.dumps({"text": text}) for text in texts(words, count, 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    job = TrainQuality(
        output=str(tmp_path / "run"),
        good=(JsonLines(path=str(tmp_path / "good.jsonl")),),
        raw=(JsonLines(path=str(tmp_path / "raw.jsonl")),),
        bits=12,
    )
    job.run()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert float(results["tiles"][0][1]) >= 0.98
    assert isinstance(load_quality(tmp_path / "run" / "quality.npz"), QualityModel)
    job.run()


@pytest.mark.slow
@pytest.mark.skipif(not ARTICLES.is_dir(), reason="the articles are not there")
def test_articles_are_told_from_documentation_and_dirt():
    """On a fifth of the documents, which was not learned from."""
    articles = TextFiles(path=f"{ARTICLES}/*.txt", split="line")
    pages = DirtyPages(source=EmbeddedCorpus(domain="prose"))
    dirt = [page for page in pages.documents() if page.metadata["planted"] == "spam"]
    good = [one for one in articles.documents() if len(one.text) > 200][:2000]
    raw = [*dirt, *itertools.islice(EmbeddedCorpus(domain="prose").documents(), 2000)]
    learned, held = (
        [[d.text for d in kind if is_held_out(d, 0.2) == part] for kind in (good, raw)]
        for part in (False, True)
    )
    model = train_quality(*learned)
    assert area_under_curve(*([model.score(text) for text in kind] for kind in held)) >= 0.98
