"""Runs, models and texts in object stores: in fsspec's memory, and in one that lists late."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.generation import Sampling, load
from lmjax.jobs import training_run
from lmjax.jobs.report import Report
from lmjax.remote import Objects, copies, local_copy
from lmjax.runs import remote_lock, remote_run
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from tests import object_store
from tests.lmjax.jobs.base_run import prepare_alone, shared_learners
from tests.lmjax.jobs.test_kill import SMALL
from tests.lmjax.jobs.test_pretrain import STEPS, interrupt_at, parameters, records, small
from tests.lmjax.jobs.test_several_processes import SETTINGS as SEVERAL
from tests.lmjax.jobs.test_several_processes import outcome, pair

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def learners():
    """See `shared_learners`."""
    with shared_learners():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in a local folder that was left alone to its end; not to be changed."""
    experiment = small(tmp_path_factory.mktemp("finished"))
    experiment.run()
    return experiment


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Copies and objects in folders of the test's own, and a quick lock."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(object_store.FOLDER, str(tmp_path / "objects"))
    (tmp_path / "objects").mkdir()
    monkeypatch.setattr(remote_lock, "BEAT", 0.2)
    monkeypatch.setattr(remote_lock, "LOOK", 0.1)
    monkeypatch.setattr(remote_lock, "PATIENCE", 2.0)
    yield tmp_path
    fsspec.filesystem("memory").store.clear()


# The store that lists late is the harder one; the other is fsspec's own.
@pytest.fixture(params=["late"])
def bucket(request, caches):
    """The URL of an empty place in each store."""
    return f"{request.param}://bucket/runs"


@pytest.fixture
def there(finished, bucket):
    """The run as it will be in the store."""
    return replace(finished, output=f"{bucket}/run")


@pytest.fixture(scope="module")
def sent(finished, tmp_path_factory):
    """All objects after a run, and of each checkpoint the steps that had no metrics there yet."""
    folder, lacking = tmp_path_factory.mktemp("sent"), []
    add = remote_run.RemoteRun.add

    def look(run, step, path, elsewhere):
        lines = run.objects.read("metrics.jsonl").decode().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        lacking.append((step, [s for s in range(1, step + 1) if s not in steps]))
        add(run, step, path, elsewhere)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMJAX_CACHE", str(folder / "cache"))
        patch.setenv(object_store.FOLDER, str(folder / "objects"))
        (folder / "objects").mkdir()
        patch.setattr(remote_run.RemoteRun, "add", look)
        replace(finished, output="late://bucket/runs/run").run()
    return folder / "objects", lacking


@pytest.fixture
def done(there, sent, caches):
    """The run in the store after its end; this machine has no copy."""
    shutil.copytree(sent[0], caches / "objects", dirs_exist_ok=True)
    return there


def anew():
    """As another machine would begin: no copy is left."""
    for file in sorted(copies().rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


def assert_same(one, other):
    """Every line, and every bit of the last checkpoint."""
    assert records(one.output) == records(other.output)
    (left, left_extra), (right, right_extra) = parameters(one), parameters(other)
    assert left_extra["step"] == right_extra["step"]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "bucket", [pytest.param("memory", marks=pytest.mark.slow), "late"], indirect=True
)
def test_a_run_in_a_store_is_that_in_a_folder(finished, there, capsys):
    """To its bits; and generation, the report and the same command read it there."""
    there.run()
    told = capsys.readouterr().out
    assert f"Everything is in {there.output}" in told
    assert f"lmjax.generation {there.output} prompt" in told
    assert str(copies()) not in told
    anew()
    assert_same(there, finished)
    assert Checkpointer(RunFolder(there.output).checkpoints).steps() == [3, 6, 8]
    objects = Objects(there.output)
    assert {"config.json", "results.json", "report.html", "tokenizer/tokenizer.json"} <= set(
        objects.index()
    )
    assert all(objects.read(name) is not None for name in objects.index())
    assert objects.read(".lock") is None
    with jax.set_mesh(finished.mesh.build()):
        texts = [
            load(output).generate(["line 7"], Sampling(temperature=0), 8)
            for output in (there.output, finished.output)
        ]
    assert texts[0] == texts[1]
    objects.write("report.html", b"")
    Report(folder=there.output).run()
    assert b"line 7" in objects.read("report.html")
    before = objects.read("metrics.jsonl")
    capsys.readouterr()
    there.run()
    assert "all 8 steps were done before" in capsys.readouterr().out
    assert objects.read("metrics.jsonl") == before


def test_an_interrupted_run_goes_on_elsewhere_to_the_same_bits(finished, there, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_at(patch, 4)
        there.run()
    assert stopped.value.code == 128 + signal.SIGINT
    anew()
    assert Checkpointer(RunFolder(there.output).checkpoints).steps() == [3, 5]
    there.run()
    assert_same(there, finished)


def test_superseded_checkpoints_leave_no_object(there):
    every = replace(there, checkpoint=replace(there.checkpoint, every=1, keep=2))
    every.run()
    objects = Objects(there.output)
    steps = {name.split("/")[1] for name in objects.index() if name.startswith("checkpoints/")}
    assert steps == {"7", "8"}
    if there.output.startswith("late"):
        left = {n.split("/")[4] for n in object_store.objects() if "/checkpoints/" in n}
        assert left == steps


def damaged(objects, step, damage):
    """Damages the largest file of a checkpoint, or takes its manifest away."""
    names = [name for name in objects.index() if name.startswith(f"checkpoints/{step}/")]
    largest = max(names, key=lambda name: len(objects.read(name)))
    if damage == "cut":
        objects.write(largest, objects.read(largest)[:-1])
    elif damage == "missing":
        objects.delete(largest)
    else:
        objects.delete(f"checkpoints/{step}/manifest.json")


@pytest.mark.parametrize("damages", [{8: "cut", 6: "missing"}, {8: "no manifest"}], ids=str)
def test_a_damaged_checkpoint_is_passed_over(finished, done, capsys, damages, monkeypatch):
    """The run goes on from the last one that is whole, in one of the cases to its end."""
    objects = Objects(done.output)
    objects.delete("results.json")
    for step, damage in damages.items():
        damaged(objects, step, damage)
    whole = [step for step in (3, 6, 8) if step not in damages]
    if len(damages) == 2:
        done.run()
    else:
        prepare_alone(done, monkeypatch, before="train")
    told = " ".join(capsys.readouterr().out.split())
    for step in damages:
        assert f"{done.output}/checkpoints/{step} is damaged" in told
    assert f"step {whole[-1]}" in told
    if len(damages) == 2:
        anew()
        assert_same(done, finished)


def test_what_is_not_in_the_index_is_no_checkpoint(finished, done):
    """As a process that was killed while it sent one leaves it."""
    objects = Objects(done.output)
    names = objects.index()
    objects.write(
        remote_run.INDEX,
        json.dumps({"files": [n for n in names if not n.startswith("checkpoints/8/")]}).encode(),
    )
    objects.delete("results.json")
    assert Checkpointer(RunFolder(done.output).checkpoints).steps() == [3, 6]
    done.run()
    anew()
    assert_same(done, finished)


def test_two_processes_in_one_folder(there, tmp_path, monkeypatch):
    """The second is refused while the first one lives, on this machine and on another."""
    objects = Objects(there.output)
    with remote_lock.remote_lock(objects, tmp_path / "lock", print):
        second = remote_lock.remote_lock(objects, tmp_path / "lock", print)
        with (
            pytest.raises(UserError, match=r"another process is training in .*this machine"),
            second,
        ):
            pass
        monkeypatch.setattr(remote_lock, "_is_dead_here", lambda owner, local: False)
        before = [name for name in (objects.listed()) if name != ".lock"]
        with pytest.raises(UserError, match=rf"another process is training in {there.output}"):
            there.run()
        assert [name for name in objects.listed() if name != ".lock"] == before
    assert objects.read(".lock") is None


def test_the_lock_of_a_dead_process_is_taken(bucket, tmp_path, monkeypatch):
    """At once where it was on this machine; elsewhere when it gives no sign of life."""
    objects = Objects(f"{bucket}/run")
    content = json.loads(remote_lock._content("dead", tmp_path / "lock", 3))
    (tmp_path / "lock").touch()
    began, said = time.monotonic(), []
    for name in ("lock", "lock 2"):  # of the same cache folder, and of another
        objects.write(".lock", json.dumps(content).encode())
        with remote_lock.remote_lock(objects, tmp_path / name, said.append):
            assert time.monotonic() - began < remote_lock.PATIENCE and not said
    objects.write(".lock", json.dumps(content | {"host": "another"}).encode())
    with remote_lock.remote_lock(objects, tmp_path / "lock 2", said.append):
        assert time.monotonic() - began >= remote_lock.PATIENCE
    assert "is locked by process" in said[0]


def test_who_has_lost_the_lock_makes_nothing_visible(there, monkeypatch):
    """A machine that slept while another one took the run over."""
    monkeypatch.setattr(remote_lock, "BEAT", 60.0)  # it sleeps
    add = remote_run.RemoteRun.add

    def taken_over(run, step, folder, elsewhere):
        if step == 6:
            run.objects.write(".lock", b'{"token": "other", "pid": 1, "host": "other"}')
        add(run, step, folder, elsewhere)

    monkeypatch.setattr(remote_run.RemoteRun, "add", taken_over)
    with pytest.raises(UserError, match="not this process's any more: process 1 on other has"):
        there.run()
    anew()
    objects = Objects(there.output)
    assert Checkpointer(RunFolder(there.output).checkpoints).steps() == [3]
    assert json.loads(objects.read(".lock"))["token"] == "other"


def test_metrics_are_in_the_store_before_their_checkpoint(sent):
    assert sent[1] == [(3, []), (6, []), (8, [])]


def test_a_store_that_fails_ends_the_run_and_it_goes_on(finished, there, monkeypatch):
    upload = Objects.upload

    def failing(self, name, path):
        if name.startswith("checkpoints/6/"):
            raise OSError("the connection was closed")
        upload(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "upload", failing)
        wanted = rf"step 6 could not be written in {there.output}/checkpoints(.|\n)*complete: 3"
        with pytest.raises(UserError, match=wanted):
            there.run()
    anew()
    there.run()
    assert_same(there, finished)


def test_a_mistake_leaves_nothing(there):
    small_vocabulary = replace(there, model=replace(there.model, vocab_size=200))
    with pytest.raises(UserError, match=r"set model\.vocab_size=257"):
        small_vocabulary.run()
    objects = Objects(there.output)
    for name in ("config.json", "index.json", ".lock", "tokenizer/tokenizer.json"):
        assert objects.read(name) is None


def test_a_folder_of_something_else_is_refused(there):
    objects = Objects(there.output)
    objects.write("notes.txt", b"mine")
    for _ in range(object_store.LATE):
        objects.listed()
    with pytest.raises(UserError, match="exists and is not a run folder"):
        there.run()
    assert objects.read("notes.txt") == b"mine" and objects.read(".lock") is None


def test_files_are_sent_while_training_goes_on(there, monkeypatch):
    """Between checkpoints too, so that a run can be watched."""
    monkeypatch.setattr(remote_run, "SECONDS", 0.05)
    monkeypatch.setattr(remote_run, "SHARE", 0)
    seen, stop = set(), threading.Event()

    def watch():
        objects = Objects(there.output)
        while not stop.wait(0.02):
            lines = (objects.read("metrics.jsonl") or b"").count(b"\n")
            seen.add(lines)

    watching = threading.Thread(target=watch)
    watching.start()
    far = replace(there, checkpoint=replace(there.checkpoint, every=1000))

    class Slow(training_run.MetricsWriter):
        def write(self, record):
            super().write(record)
            time.sleep(0.2)

    monkeypatch.setattr(training_run, "MetricsWriter", Slow)
    far.run()
    stop.set()
    watching.join()
    assert len(seen & set(range(1, STEPS))) >= 2


def start(*settings, devices=1, **environment):
    """A run of the debug experiment in a process of its own, which knows the store."""
    program = (
        "from tests import object_store\n"
        "from experiments.debug import experiment\n"
        "from lmjax.launch import run\n"
        "run(experiment)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *settings],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(caches, monkeypatch):
    """kill -9 behind a checkpoint, and the same command again: its own lock does not hold it."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.same_run import differences

    settings = (*SMALL, "steps=24", "checkpoint.every=4", f"data.cache={caches / 'tokens'}")
    alone = start(f"output={caches / 'alone'}", *settings)
    assert alone.wait(300) == 0, alone.stdout.read()
    url = "late://bucket/killed"
    process = start(f"output={url}", *settings)
    steps = []
    while len(steps) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
        steps = Objects(url).index() or []
        steps = [name for name in steps if name.endswith("/manifest.json")]
    process.kill()
    process.wait()
    assert Objects(url).read(".lock") is not None and Objects(url).read("results.json") is None
    again = start(f"output={url}", *settings)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "after step" in said and "is locked by" not in said
    assert differences(caches / "alone", url, 24) == []


@pytest.mark.slow
def test_processes_that_share_no_disk(caches):
    """Each with a cache of its own, as on a pod: one checkpoint, and the same bits after a kill."""

    def machine(*settings, **environment):
        number = environment["JAX_PROCESS_ID"]
        return start(*settings, LMJAX_CACHE=str(caches / f"machine-{number}"), **environment)

    def numbers(output):
        rows = RunFolder(output).metrics()
        return {(row["step"], row["split"]): row["loss"] for row in rows}

    url = "late://bucket/pod"
    alone = start(f"output={caches / 'alone'}", *SEVERAL, devices=8)
    outcome(*pair(machine, f"output={url}", *SEVERAL, devices=4))
    outcome(alone)
    objects = Objects(url)
    found, wanted = numbers(url), numbers(caches / "alone")
    assert found.keys() == wanted.keys()
    # Sums in another order, over few steps; all in float32.
    assert found == pytest.approx(wanted, rel=1e-5)
    assert not [name for name in object_store.objects() if ".part-" in name or "/.lock" in name]
    files = json.loads(objects.read("checkpoints/8/manifest.json"))["body"]["files"]
    listed = {name for name in objects.index() if name.startswith("checkpoints/8/")}
    assert {f"checkpoints/8/{name}" for name in [*files, "manifest.json"]} == listed
    pieces = {name: objects.read(f"checkpoints/8/{name}") for name in files}

    kept = [name for name in objects.index() if not name.startswith("checkpoints/8/")]
    objects.write("index.json", json.dumps({"files": kept}).encode())
    objects.delete("results.json")
    for name in pieces:
        objects.write(f"checkpoints/8/{name}", b"of a process that was killed")
    told, _ = outcome(*pair(machine, f"output={url}", *SEVERAL, devices=4))
    assert "after step 4" in told
    assert numbers(url) == found
    apart = ("_CHECKPOINT_METADATA", "commit_success.txt")  # the time of writing
    for name, data in pieces.items():
        if not name.endswith(apart):
            assert objects.read(f"checkpoints/8/{name}") == data, name


def test_copies_are_brought_up_to_date(bucket):
    objects = Objects(f"{bucket}/model")
    objects.write("index.json", json.dumps({"files": ["a", "b", "sub/c", "../d"]}).encode())
    for name in ("a", "b", "sub/c"):
        objects.write(name, name.encode())
    folder = local_copy(objects.url, "model")
    assert (folder / "sub" / "c").read_text() == "sub/c"
    number = (folder / "a").stat().st_ino
    objects.write("b", b"new")
    objects.write("index.json", json.dumps({"files": ["a", "b"]}).encode())
    assert local_copy(objects.url, "model") == folder
    assert (folder / "a").stat().st_ino == number, "was read again"
    assert (folder / "b").read_text() == "new"
    assert not (folder / "sub" / "c").exists()
