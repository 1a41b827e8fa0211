"""Recipes of published corpora: experiments that can be run and kept, and steps that work."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import pytest

from lmjax.config import from_json, parse, to_json, to_text
from lmjax.data import JsonLines
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    QualityFilter,
    baichuan2_cleaning,
    ccnet_cleaning,
    gpt3_cleaning,
    pile_cleaning,
    qwen_cleaning,
    recipes,
    skywork_cleaning,
)
from lmjax.data.cleaning.ngram_model import train_ngrams
from lmjax.data.cleaning.perplexity import MODEL, TOKENIZER
from lmjax.data.cleaning.pipeline import CleaningPipeline, flat
from lmjax.data.cleaning.quality import train_quality
from lmjax.data.cleaning.toxicity import train_toxicity
from lmjax.data.tokenizers.base import ByteTokenizer

FOLDER = Path(__file__).parents[4] / "experiments" / "data"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
WANTED = {
    *("gpt3", "c4", "gopher", "refinedweb", "fineweb", "ccnet", "pile_like", "baichuan2"),
    *("qwen", "skywork", "demo"),
}


def test_all_recipes_are_there():
    assert set(NAMES) >= WANTED


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_can_be_run_and_kept(name):
    module = importlib.import_module(f"experiments.data.{name}")
    experiment, words = module.experiment, module.__doc__
    assert callable(experiment.run) and experiment.output == f"runs/{name}"
    assert from_json(to_json(experiment)) == experiment
    assert parse(experiment, to_text(experiment).splitlines()) == experiment
    assert f"python -m experiments.data.{name}" in words
    assert any(unit in words for unit in ("second", "minute", "hour", "day"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """English and Chinese texts, some of them twice, and models of all kinds."""
    folder, rng = tmp_path_factory.mktemp("recipes"), random.Random(0)
    words = [
        "the",
        "river",
        "of",
        "that",
        "old",
        "and",
        "its",
        "boats",
        "have",
        "been",
        "with",
        "to",
    ]
    english = [f"Of {n} things: " + " ".join(rng.choices(words, k=80)) + "." for n in range(30)]
    signs = "河水慢慢上涨城里的人把家具搬到楼上没有抱怨因为带来了肥沃泥土"
    chinese = ["".join(rng.choices(signs, k=150)) + "。" for _ in range(20)]
    texts = [*english, *chinese, *english[:5], *chinese[:5]]
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_quality(english + chinese, ["buy now cheap"] * 9, bits=10).save(folder / "quality.npz")
    labels = [frozenset()] * 30 + [frozenset({"insult"})] * 9
    toxic = train_toxicity([*english, *["you awful fool"] * 9], labels, bits=10)
    toxic.save(folder / "toxicity.npz")
    for code, own in (("en", english), ("zh", chinese)):
        tokenizer = ByteTokenizer()
        (folder / code).mkdir()
        tokenizer.save(folder / code / TOKENIZER)
        model = train_ngrams([tokenizer.encode(text) for text in own], 257, 3)
        model.save(folder / code / MODEL)
    return folder


def made(corpus, output, recipe):
    collection = Collection(name="texts", source=JsonLines(path=str(corpus / "t.jsonl")))
    output.mkdir()
    CleaningPipeline((collection,), flat((recipe,)), JsonLinesOutput(), output).run()
    return json.loads((output / "summary.json").read_text())["ledgers"]["texts"]


@pytest.mark.parametrize(
    ("name", "languages"),
    [("ccnet", 2), ("pile", 1), ("baichuan2", None), ("qwen", 2), ("skywork", 2), ("gpt3", None)],
)
def test_copies_are_dropped_and_good_text_stays(corpus, tmp_path, name, languages):
    quality = str(corpus / "quality.npz")
    recipe = {
        "ccnet": lambda: ccnet_cleaning(models=f"{corpus}/{{}}", languages=("en", "zh")),
        "pile": lambda: pile_cleaning(),
        "baichuan2": lambda: baichuan2_cleaning(),
        "qwen": lambda: qwen_cleaning(f"{corpus}/{{}}", "", str(corpus / "toxicity.npz")),
        "skywork": lambda: skywork_cleaning(),
        "gpt3": lambda: gpt3_cleaning(),
    }[name]()
    ledger = made(corpus, tmp_path / "out", recipe)
    kept = sum(ledger["lengths"].values())
    if languages is not None:
        assert len(ledger["languages"]) == languages
    if name in ("ccnet", "baichuan2", "skywork"):
        assert kept == 50
    else:
        assert 0 < kept <= 50
    with_quality = gpt3_cleaning(quality=quality).steps[0]
    assert isinstance(with_quality, QualityFilter) and with_quality.shape == 9
    assert pile_cleaning(quality=quality).steps[1].shape == 3
    assert recipes.__doc__
