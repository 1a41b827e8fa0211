"""From settings to stores and loader: caches, held-out text, weights, and a run that goes on."""

import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import threading

import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.data import run_tokenizer
from lmjax.data.cache import cache_folder
from lmjax.data.preparation import prepare
from lmjax.data.rows import RowFormat
from lmjax.data.settings import Data, Domain, Stage
from lmjax.data.sources import JsonLines, JsonPrompts, TextFiles
from lmjax.data.tokenizers import Bytes, Characters, load_tokenizer
from lmjax.data.tokenizers.special_tokens import WithTokens
from lmjax.data.tokenizers.subwords import TrainedBPE


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
    loader = prepare(data, tmp_path / "run").loader(
        data.plan(1), lambda *given: given, RowFormat(17)
    )
    source, _ = loader.mixture.locate(np.arange(40))
    assert np.bincount(source).tolist() == [30, 10]
    tokens, segments, seeds = loader.batch(5)
    assert tokens.shape == segments.shape == (4, 17) and seeds.shape == (4,)


def test_a_loader_of_overlapping_rows_goes_through_an_epoch_in_more_of_them(data, tmp_path):
    ready = prepare(data, tmp_path / "run")
    apart, overlapping = (
        ready.loader(data.plan(1), lambda *given: given, RowFormat(17, overlap)).mixture.epochs(
            4000
        )
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
    mixture = ready.loader(plan, lambda *given: given, RowFormat(17)).mixture
    assert plan.rows(3)[0] == 4 + 2 * 8 + 8
    for step, shares in ((1, [6, 2]), (2, [6, 2]), (3, [0, 2, 6]), (9, [0, 2, 6])):
        source, _ = mixture.locate(plan.rows(step))
        assert np.bincount(source).tolist() == shares


def test_tokenizer_is_kept_with_the_run_and_learns_from_training_text_alone(data, tmp_path):
    ready = prepare(data, tmp_path / "run")
    saved = load_tokenizer(tmp_path / "run")
    assert saved.fingerprint == ready.tokenizer.fingerprint
    sample = list(run_tokenizer._Texts(data, lambda *progress: None).sample(10**9))
    assert set(sample) == {*texts(ready.train["poems"]), *texts(ready.train["prose"])}
    share = list(run_tokenizer._Texts(data, lambda *progress: None).sample(4000))
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


@pytest.mark.parametrize("kind", ["tokenizers", "tokens"])
def test_what_a_message_about_a_damaged_cache_says_helps(data, tmp_path, kind):
    first = prepare(data, tmp_path / "run")
    for path in (tmp_path / "cache" / kind).rglob("*.json"):
        path.write_text("{")
    told = set()
    while True:
        try:
            again = prepare(data, tmp_path / "another run")
            break
        except UserError as error:
            folder = re.search(r"delete (\S+), and it is made again", str(error))[1]
            assert folder not in told and pathlib.Path(folder).parent == tmp_path / "cache" / kind
            told.add(folder)
            shutil.rmtree(folder)
    assert told and again.tokenizer.fingerprint == first.tokenizer.fingerprint
    for name, store in first.train.items():
        assert again.train[name].manifest == store.manifest


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


def copied(data, corpus, place, ending=""):
    """The same settings for a copy of the corpus in another place, with other names and times."""
    place.mkdir()
    for path in corpus.iterdir():
        (place / f"{path.stem}{ending}{path.suffix}").write_bytes(path.read_bytes())

    def moved(source):
        path = pathlib.Path(source.path)
        return replace(source, path=str(place / f"{path.stem}{ending}{path.suffix}"))

    return replace(
        data,
        train=tuple(
            replace(
                domain,
                source=moved(domain.source),
                evaluation=domain.evaluation and moved(domain.evaluation),
            )
            for domain in data.train
        ),
    )


def test_a_corpus_that_was_copied_is_the_same(data, corpus, tmp_path, monkeypatch):
    first = prepare(data, tmp_path / "run")
    os.utime(corpus / "poems.txt")
    monkeypatch.setattr(TrainedBPE, "build", None)
    monkeypatch.setattr("lmjax.data.tokenize.make_shards", None)
    for number, settings in enumerate(
        (data, copied(data, corpus, tmp_path / "b"), copied(data, corpus, tmp_path / "c", "-copy"))
    ):
        again = prepare(settings, tmp_path / "run", before=first.fingerprints)
        assert again.fingerprints == first.fingerprints and again.warnings == ()
        assert again.train["poems"].folder == first.train["poems"].folder
        other = prepare(settings, tmp_path / f"run{number}", before=first.fingerprints)
        assert other.tokenizer.fingerprint == first.tokenizer.fingerprint


def cut_short(path):
    path.write_text(path.read_text()[:-10])


def same_size_and_time(path):
    before = path.stat()
    path.write_text(path.read_text().replace("7", "8"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def longer(path):
    with path.open("a") as file:
        file.write("\n\nmore")


SOURCE, EVALUATION = ("poems.txt", r"poems \(source\)"), ("other.txt", r"prose \(evaluation\)")


@pytest.mark.parametrize(
    ("change", "file", "tokenizer"),
    [
        (cut_short, SOURCE, TrainedBPE(vocab_size=300)),
        (same_size_and_time, SOURCE, Bytes()),
        (same_size_and_time, EVALUATION, TrainedBPE(vocab_size=300)),
        (longer, EVALUATION, Bytes()),
    ],
)
def test_a_corpus_that_was_changed_is_another(data, corpus, tmp_path, change, file, tokenizer):
    data, (name, told) = replace(data, tokenizer=tokenizer), file
    before = prepare(data, tmp_path / "run").fingerprints
    (corpus / "other.txt").write_text("quite another text, with a 7: \u00e9" * 3)
    before = prepare(data, tmp_path / "run-2").fingerprints
    change(corpus / name)
    with pytest.raises(UserError, match=rf"another one than the run was trained on.*{told}.*warn"):
        prepare(data, tmp_path / "run-2", before=before)
    warned = prepare(replace(data, on_change="warn"), tmp_path / "run-2", before=before)
    assert "another one than the run was trained on" in warned.warnings[0]
    assert ("made from the text before" in warned.warnings[-1]) == (tokenizer != Bytes())
    assert warned.fingerprints != before
    assert prepare(data, tmp_path / "run-3").warnings == ()


def test_files_in_another_order_are_another_text(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    source = TextFiles(path=f"{tmp_path}/?.txt")
    before = source.fingerprint()
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert source.fingerprint() != before


def test_a_tokenizer_from_before_texts_were_known_by_content_stays(data, tmp_path):
    prepare(data, tmp_path / "run")
    origin = tmp_path / "run" / "origin.txt"
    origin.write_text("0123456789ab")  # of times of files
    assert prepare(data, tmp_path / "run").warnings == ()
    origin.write_text("something else")
    with pytest.raises(UserError, match="was made from other text or other settings"):
        prepare(data, tmp_path / "run")


def test_other_settings_of_a_tokenizer_are_refused_whatever_is_allowed(data, tmp_path):
    prepare(data, tmp_path / "run")
    for other in (TrainedBPE(vocab_size=310), Bytes()):
        with pytest.raises(UserError, match="other settings"):
            prepare(replace(data, tokenizer=other, on_change="warn"), tmp_path / "run")


@pytest.mark.parametrize("tokenizer", [Bytes(), TrainedBPE(vocab_size=300)])
@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache", "file", "file/below"])
def test_a_cache_that_cannot_be_written_is_told_with_what_to_set(
    data, tmp_path, monkeypatch, tokenizer, place
):
    (tmp_path / "file").touch()
    data = replace(data, tokenizer=tokenizer, cache=str(tmp_path / place))
    monkeypatch.setattr(TrainedBPE, "build", None)  # not made before that is known
    with pytest.raises(UserError, match=r"cannot keep tokens in.*data\.cache=FOLDER .*LMJAX_CACHE"):
        prepare(data, tmp_path / "run")


def test_without_a_home_the_cache_must_be_named(data, tmp_path, monkeypatch):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LMJAX_CACHE", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", nobody)
    with pytest.raises(UserError, match=r"Could not determine home .*data\.cache=FOLDER"):
        prepare(replace(data, cache=""), tmp_path / "run")


def test_a_finished_cache_may_be_read_only(data, tmp_path, monkeypatch):
    """One that a group shares: nothing needs to be written there any more."""
    first = prepare(data, tmp_path / "run")
    path_open = pathlib.Path.open

    def read_only(path, mode="r", *arguments, **settings):
        if path.is_relative_to(data.cache) and mode[0] in "wa":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_open(path, mode, *arguments, **settings)

    monkeypatch.setattr(pathlib.Path, "open", read_only)
    again = prepare(data, tmp_path / "another run")
    assert again.train["poems"].folder == first.train["poems"].folder


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_cache_without_locks_is_right_without_them(data, tmp_path, monkeypatch, code):
    expected = prepare(data, tmp_path / "run")

    def flock(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    data = replace(data, cache=str(tmp_path / "other cache"))
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(prepare(data, tmp_path / f"run{n}")))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for ready in found:
        for name, store in expected.train.items():
            assert ready.train[name].manifest == store.manifest
    assert not list((tmp_path / "other cache" / "tokens").glob("*.partial*"))


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
