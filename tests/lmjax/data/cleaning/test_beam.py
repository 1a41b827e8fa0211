"""Beam: the same bytes as on one machine; what a killed worker leaves is never read as whole."""

import json

import pytest

from lmjax.config import UserError
from lmjax.data.cleaning import beam as on_beam
from lmjax.data.cleaning.pipeline import WORK, CleaningPipeline
from lmjax.data.cleaning.summary import SUMMARY
from tests.lmjax.data.cleaning.test_pipeline import made, pipeline, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, documents=12)
    return folder


@pytest.fixture(scope="module")
def on_one_machine(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    return output, pipeline(corpus, output).run()


def run_workers(cleaning, storage, shards=None):
    """All that a runner asks its workers for, in order; some shards of the first pass alone."""
    tasks = cleaning._tasks(cleaning._shards(), None, 0)
    lines = list(map(on_beam._line, tasks))
    for number in range(len(cleaning.passes)):
        for line in lines[:shards]:
            on_beam.make_on_worker(cleaning, storage, number, line)
        if shards is not None:
            return
        is_last = number == len(cleaning.passes) - 1
        then = on_beam.finish_on_worker if is_last else on_beam.decide_on_worker
        then(cleaning, storage, lines, number, len(lines))


def output_of(storage):
    """The bytes of an output, less the work that is left beside it."""
    return {name: data for name, data in made(storage).items() if not name.startswith(f"{WORK}/")}


def test_workers_make_the_bytes_of_one_machine(on_one_machine, corpus, tmp_path):
    storage = tmp_path / "storage"
    run_workers(pipeline(corpus, tmp_path / "none"), str(storage))
    assert output_of(storage) == made(on_one_machine[0])
    found = json.loads((storage / SUMMARY).read_text("utf-8"))
    assert found["findings"] == on_one_machine[1].findings
    assert found["pairs"] == on_one_machine[1].pairs


def test_beam_makes_the_bytes_of_one_machine(on_one_machine, corpus, tmp_path):
    reason = "apache-beam is not installed: pip install 'lmjax[beam]'"
    pytest.importorskip("apache_beam", reason=reason)
    storage = tmp_path / "storage"
    run = on_beam.BeamRun(pipeline(corpus, tmp_path / "none"), str(storage))
    summary = run.run("FnApiRunner")
    assert made(storage) == made(on_one_machine[0])
    assert summary.pairs == on_one_machine[1].pairs
    # It is finished, and nothing is done again.
    assert run.run("NoRunner").findings == summary.findings


class Killed(BaseException):
    """A worker is killed."""


@pytest.mark.parametrize("files", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 5))])
def test_a_killed_worker_leaves_nothing_that_reads_as_whole(
    on_one_machine, corpus, tmp_path, monkeypatch, files
):
    cleaning, storage = pipeline(corpus, tmp_path / "none"), tmp_path / "storage"
    upload, left = on_beam._Here.upload, [files]

    def upload_some(store, name, path):
        left[0] -= 1
        if left[0] < 0:
            store._put(name, lambda unfinished: unfinished.write_bytes(path.read_bytes()[:9]))
            raise Killed
        upload(store, name, path)

    monkeypatch.setattr(on_beam._Here, "upload", upload_some)
    with pytest.raises(Killed):
        run_workers(cleaning, str(storage), shards=1)
    monkeypatch.undo()
    store = on_beam._Store(str(storage))
    assert not store.has("pass-0/shard-000000") and not (storage / "documents").exists()
    with pytest.raises(UserError, match="is not complete"):
        store.fetch("pass-0/shard-000000", tmp_path / "copy")
    # A manifest that was cut is none.
    store.objects.write(f"{WORK}/pass-0/shard-000000.json", b'{"attempt": "1", "siz')
    assert not store.has("pass-0/shard-000000")
    run_workers(cleaning, str(storage))
    assert output_of(storage) == made(on_one_machine[0])


def test_two_workers_may_make_the_same_shard(on_one_machine, corpus, tmp_path, monkeypatch):
    cleaning, storage = pipeline(corpus, tmp_path / "none"), tmp_path / "storage"
    with monkeypatch.context() as patch:
        patch.setattr(on_beam._Store, "has", lambda store, name: False)
        for _ in range(2):
            run_workers(cleaning, str(storage), shards=2)
    run_workers(cleaning, str(storage))
    assert output_of(storage) == made(on_one_machine[0])


def test_a_file_that_was_cut_is_not_read(corpus, tmp_path):
    cleaning, storage = pipeline(corpus, tmp_path / "none"), tmp_path / "storage"
    run_workers(cleaning, str(storage), shards=1)
    (path,) = storage.rglob("documents.jsonl.*")
    path.write_bytes(path.read_bytes()[:-1])
    store = on_beam._Store(str(storage))
    with pytest.raises(UserError, match="has not the bytes it had"):
        store.fetch("pass-0/shard-000000", tmp_path / "copy")


def test_other_text_is_refused(corpus, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed")
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "made_from.txt").write_text("other")
    run = on_beam.BeamRun(pipeline(corpus, tmp_path / "none"), str(tmp_path))
    with pytest.raises(UserError, match="unfinished work on other text"):
        run.run("FnApiRunner")


def test_a_missing_library_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    run = on_beam.BeamRun(pipeline(corpus, tmp_path / "none"), str(tmp_path))
    with pytest.raises(UserError, match=r"lmjax\[beam\]"):
        run.run("FnApiRunner")
    assert isinstance(run.pipeline, CleaningPipeline)
