"""From settings to stores and loader: caches, held-out text, weights, and a run that goes on."""

import json
import pathlib

import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.data import preparation
from lmjax.data.cache import cache_folder
from lmjax.data.preparation import Data, Domain, Stage, prepare
from lmjax.data.sources import JsonLines, JsonPrompts, TextFiles
from lmjax.data.special_tokens import WithTokens
from lmjax.data.subwords import TrainedBPE
from lmjax.data.tokenizers import Bytes, Characters, load_tokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    poems = "\n\n".join(f"poem {n}\nwith its second line {n * n}" for n in range(300))
    (folder / "poems.txt").write_text(poems)
    lines = [json.dumps({"text": f"prose {n}, and more of the same {n}"}) for n in range(300)]
    (folder / "prose.jsonl").write_text("\n".join([*lines, "{"]))
    (folder / "other.txt").write_text("quite another text: \u00e9")
    return folder


@pytest.fixture
def data(corpus, tmp_path):
    return Data(
        train=(
            Domain(
                name="poems",
                source=TextFiles(path=str(corpus / "poems.txt"), split="paragraph"),
                weight=3.0,
            ),
            Domain(
                name="prose",
                source=JsonLines(path=str(corpus / "prose.jsonl"), on_error="skip"),
                evaluation=TextFiles(path=str(corpus / "other.txt")),
            ),
            Domain(name="other", source=TextFiles(path=str(corpus / "other.txt")), weight=0.0),
        ),
        tokenizer=TrainedBPE(vocab_size=300),
        held_out=0.2,
        length=16,
        batch_size=4,
        cache=str(tmp_path / "cache"),
    )


def texts(store):
    """Its documents."""
    return [text.decode() for text in store.source_texts()]


def test_stores_by_domain(data, tmp_path):
    ready = prepare(data, tmp_path / "run")
    assert list(ready.train) == ["poems", "prose"]
    assert list(ready.held_out) == ["poems", "prose", "other"]
    poems = [*texts(ready.train["poems"]), *texts(ready.held_out["poems"])]
    assert sorted(poems) == sorted(document.text for document in data.train[0].source.documents())
    # Its own evaluation text: all of the source is trained on.
    assert ready.train["prose"].manifest.documents == 300
    assert list(texts(ready.held_out["prose"])) == ["quite another text: \u00e9"]
    assert list(ready.skipped().values()) == [1]
    assert "line 301" in next(iter(ready.skipped()))


def test_loader_mixes_with_the_weights(data, tmp_path):
    loader = prepare(data, tmp_path / "run").loader(data.plan(1), lambda *given: given, 17)
    source, _ = loader.mixture.place(np.arange(40))
    assert np.bincount(source).tolist() == [30, 10]
    tokens, segments, seeds = loader.batch(5)
    assert tokens.shape == segments.shape == (4, 17) and seeds.shape == (4,)


def test_a_loader_of_overlapping_rows_goes_through_an_epoch_in_more_of_them(data, tmp_path):
    ready = prepare(data, tmp_path / "run")
    apart, overlapping = (
        ready.loader(data.plan(1), lambda *given: given, 17, overlap).mixture.epochs(4000)
        for overlap in (1, 9)
    )
    # Every 8 tokens instead of 16; whole rows are counted.
    assert overlapping == {name: pytest.approx(n / 2, rel=0.02) for name, n in apart.items()}


def test_a_second_stage_has_its_own_weights_and_may_bring_a_domain(data, tmp_path):
    prose, other = data.train[1:]
    data = replace(
        data,
        train=(data.train[0], prose, replace(other, name="new", source=prose.source)),
        stages=(Stage(first_step=3, weights=(0.0, 1.0, 3.0)),),
    )
    ready = prepare(data, tmp_path / "run")
    assert list(ready.train) == ["poems", "prose", "new"]
    # It is trained on later, so a part of it is held out from the start.
    assert 0 < ready.held_out["new"].manifest.documents < 100
    # With a ramp before it and rows left out, the stage begins at its step all the same.
    plan = replace(data, ramp=((1, 8),)).plan(1).skipping(1, 1)
    mixture = ready.loader(plan, lambda *given: given, 17).mixture
    assert plan.rows(3)[0] == 4 + 2 * 8 + 8
    for step, shares in ((1, [6, 2]), (2, [6, 2]), (3, [0, 2, 6]), (9, [0, 2, 6])):
        source, _ = mixture.place(plan.rows(step))
        assert np.bincount(source).tolist() == shares


def test_tokenizer_is_kept_with_the_run_and_learns_from_training_text_alone(data, tmp_path):
    ready = prepare(data, tmp_path / "run")
    saved = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert saved.fingerprint == ready.tokenizer.fingerprint
    sample = list(preparation._Texts(data, lambda *progress: None).sample(10**9))
    assert set(sample) == {*texts(ready.train["poems"]), *texts(ready.train["prose"])}
    share = list(preparation._Texts(data, lambda *progress: None).sample(4000))
    poems = sum(len(text) for text in share if text.startswith("poem"))
    prose = sum(len(text) for text in share if text.startswith("prose"))
    # 3000 and 1000 bytes, each exceeded by less than one document of at most 40.
    assert 3000 <= poems < 3040 and 1000 <= prose < 1040


def test_a_cached_tokenizer_and_stores_are_used_again(data, tmp_path, monkeypatch):
    first = prepare(data, tmp_path / "run")
    monkeypatch.setattr(TrainedBPE, "build", None)
    monkeypatch.setattr("lmjax.data.tokenize.make_shards", None)
    for run in ("run", "another run"):
        again = prepare(data, tmp_path / run)
        assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
        assert again.train["poems"].folder == first.train["poems"].folder


def test_a_run_does_not_go_on_with_another_tokenizer(data, tmp_path, corpus):
    prepare(data, tmp_path / "run")
    other = replace(data, tokenizer=TrainedBPE(vocab_size=310))
    with pytest.raises(UserError, match="was made from other text or other settings"):
        prepare(other, tmp_path / "run")
    (corpus / "poems.txt").write_text("another\n\ncorpus")
    with pytest.raises(UserError, match="was made from other text or other settings"):
        prepare(data, tmp_path / "run")


def test_another_text_makes_another_store(data, tmp_path, corpus):
    data = replace(data, tokenizer=Bytes(), held_out=0.0)
    before = prepare(data, tmp_path / "run").train["poems"]
    path = corpus / "poems.txt"
    path.write_text(path.read_text() + "\n\nOne more.")
    after = prepare(data, tmp_path / "run").train["poems"]
    assert after.manifest.documents == before.manifest.documents + 1
    assert after.folder != before.folder


def test_other_fields_and_marks_make_other_stores(data, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{n}?", "answer": f"{n * n}"}) for n in range(50)]
    path.write_text("\n".join(lines))
    names = "[MASK]", "[gMASK]", "<eop>"
    source = JsonPrompts(path=str(path), closing="<eop>")
    folders = set()
    for changes in ({}, {"mask": "[gMASK]"}, {"field": "answer", "answer": "prompt"}, {}):
        domain = Domain(name="prompts", source=replace(source, **changes))
        settings = replace(
            data, train=(domain,), tokenizer=WithTokens(tokenizer=Bytes(), tokens=names)
        )
        ready = prepare(settings, tmp_path / f"run{len(folders)}")
        assert {"prompts"} == set(ready.train) == set(ready.held_out)
        folders.add(ready.train["prompts"].folder)
    assert len(folders) == 3


def test_characters_know_those_of_held_out_text(data, tmp_path):
    ready = prepare(replace(data, tokenizer=Characters()), tmp_path / "run")
    assert ready.tokenizer.encode("\u00e9")


def test_character_level_text_cut_by_position(tmp_path):
    """The classic recipe: one file, the first nine tenths for training, the rest for evaluation."""
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 50)
    text = TextFiles(path=f"{tmp_path}/a.txt", span=(0.0, 0.9))
    domain = Domain(name="text", source=text, evaluation=replace(text, span=(0.9, 1.0)))
    data = Data(train=(domain,), tokenizer=Characters(), cache=f"{tmp_path}/cache")
    ready = prepare(data, tmp_path / "run")
    assert ready.train["text"].text_bytes == 855 and ready.held_out["text"].text_bytes == 95


def test_where_the_cache_lies(data, tmp_path, monkeypatch):
    data = replace(data, tokenizer=Bytes(), cache="")
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "elsewhere"))
    folder = prepare(data, tmp_path / "run").train["poems"].folder
    assert folder.is_relative_to(tmp_path / "elsewhere")
    monkeypatch.delenv("LMJAX_CACHE")
    assert cache_folder("") == pathlib.Path.home() / ".cache" / "lmjax"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ()}, "domains of different names"),
        ({"held_out": 1.0}, "below 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"length": 0}, "at least 1"),
        ({"workers": -1}, "negative"),
        ({"stages": (Stage(first_step=0, weights=(1.0, 1.0, 0.0)),)}, "must rise from 1"),
        ({"stages": (Stage(first_step=5, weights=(1.0,)),)}, "1 weights, but there are 3 domains"),
        ({"stages": (Stage(first_step=5, weights=(0.0, 0.0, 0.0)),)}, "not all 0"),
    ],
)
def test_settings_that_make_no_sense(data, changes, message):
    with pytest.raises(UserError, match=message):
        replace(data, **changes)


def test_domains_that_make_no_sense(data):
    poems = data.train[0]
    with pytest.raises(UserError, match="different names"):
        replace(data, train=(poems, poems))
    with pytest.raises(UserError, match="negative"):
        replace(poems, weight=-1.0)
    with pytest.raises(UserError, match="nothing to train on"):
        replace(data, train=(replace(poems, weight=0.0),))
    with pytest.raises(UserError, match="weight 0"):
        replace(poems, weight=0.0, evaluation=poems.source)
