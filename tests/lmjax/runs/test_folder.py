"""The run folder: made, continued, refused, locked, and never left half-made."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

from lmjax.config import UserError, config, replace
from lmjax.jobs.settings import may_change
from lmjax.runs.changes import flatten
from lmjax.runs.folder import RunFolder
from lmjax.runs.lock import lock_run_folder


@config
class FolderPart:
    """A nested part of the experiment below."""

    width: int = 4
    sizes: tuple[int, ...] = (1, 2)


@config
class FolderExperiment:
    """The least that a run folder wants of an experiment."""

    output: str
    steps: int = 10
    mesh: int = 1
    part: FolderPart = FolderPart()

    def may_change(self, setting):
        return may_change(setting)


@pytest.fixture
def experiment(tmp_path):
    return FolderExperiment(output=str(tmp_path / "run"))


def test_the_config_in_the_folder_is_the_experiment(experiment):
    with lock_run_folder(experiment) as folder:
        assert folder.experiment() == experiment


def test_the_same_experiment_goes_on(experiment):
    for _ in range(2):
        with lock_run_folder(experiment):
            pass


@pytest.mark.parametrize("change", [{"steps": 20}, {"mesh": 8}])
def test_some_settings_may_change(experiment, change):
    with lock_run_folder(experiment):
        pass
    with lock_run_folder(replace(experiment, **change)) as folder:
        assert folder.experiment() == experiment  # until the job finds that it can go on


def test_another_experiment_is_refused_and_told_apart(experiment):
    with lock_run_folder(experiment):
        pass
    other = replace(experiment, part=FolderPart(width=5, sizes=(1, 3)))
    with pytest.raises(UserError) as refused, lock_run_folder(other):
        pass
    message = str(refused.value)
    assert "part.width: 4 in the folder, 5 now" in message
    assert "part.sizes.1: 2 in the folder, 3 now" in message
    assert "output=" in message
    assert RunFolder(experiment.output).experiment() == experiment


def test_a_folder_of_something_else_is_refused_untouched(experiment, tmp_path):
    os.mkdir(experiment.output)
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"), lock_run_folder(experiment):
        pass
    assert os.listdir(experiment.output) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", '{"class": "os.system"}', "[]"])
def test_a_config_that_is_none_is_refused(experiment, tmp_path, text):
    os.mkdir(experiment.output)
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"), lock_run_folder(experiment):
        pass
    assert (tmp_path / "run" / "config.json").read_text() == text


def test_a_mistake_in_a_new_run_leaves_nothing(experiment):
    with pytest.raises(UserError, match="no corpus"), lock_run_folder(experiment) as folder:
        folder.tokenizer.mkdir()
        raise UserError("no corpus")
    assert not os.path.exists(experiment.output)


def test_a_mistake_in_a_new_run_leaves_what_was_there(experiment, tmp_path):
    hidden = tmp_path / "run" / ".git"
    hidden.mkdir(parents=True)
    with pytest.raises(UserError), lock_run_folder(experiment):
        raise UserError("no corpus")
    assert os.listdir(experiment.output) == [".git"]


def test_a_mistake_in_a_run_with_a_checkpoint_leaves_it(experiment):
    with pytest.raises(UserError), lock_run_folder(experiment) as folder:
        (folder.checkpoints / "3").mkdir(parents=True)
        raise UserError("the loss is nan")
    with lock_run_folder(experiment) as folder:
        assert os.listdir(folder.checkpoints) == ["3"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write"),
        lock_run_folder(FolderExperiment(output=str(tmp_path / "file" / "run"))),
    ):
        pass


def test_two_processes_do_not_share_a_folder(experiment):
    code = (
        "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    os.mkdir(experiment.output)
    lock = os.path.join(experiment.output, ".lock")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, lock], **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="another process"), lock_run_folder(experiment):
            pass
        other.stdin.close()
    with lock_run_folder(experiment):  # the system has freed the lock with the process
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_a_run_begins_and_says_so(experiment, monkeypatch, code):
    def flock(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    for _ in range(2):
        with lock_run_folder(experiment, said.append) as folder:
            assert folder.experiment() == experiment
    assert len(said) == 2 and "knows no locks" in said[0] and experiment.output in said[0]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_else_goes_wrong_with_a_lock_is_said_as_it_is(experiment, monkeypatch, code):
    def flock(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=os.strerror(code)) as refused, lock_run_folder(experiment):
        pass
    assert "another process" not in str(refused.value)


@pytest.mark.parametrize("change", ["gone", "not mounted"])
def test_a_folder_that_goes_wrong_meanwhile_is_left_as_it_is(experiment, tmp_path, change):
    with pytest.raises(UserError, match="the disk has gone"), lock_run_folder(experiment) as folder:
        if change == "gone":
            shutil.rmtree(folder.path)
        else:
            folder.checkpoints.symlink_to("/nowhere/mounted")
        raise UserError("the disk has gone")
    if change == "not mounted":
        assert set(os.listdir(folder.path)) == {".lock", "checkpoints", "config.json"}


def test_files_that_cannot_be_written_are_told(experiment, tmp_path):
    with lock_run_folder(experiment) as folder:
        folder.write_json("results.json", {"step": 1})
        shutil.rmtree(folder.path)
        with pytest.raises(UserError, match=r"cannot write .*results\.json: No such file"):
            folder.write_json("results.json", {"step": 2})
    link = tmp_path / "link"
    link.symlink_to("/nowhere/mounted")
    with (
        pytest.raises(UserError, match=r"link is a link to /nowhere/mounted, which is not there"),
        lock_run_folder(replace(experiment, output=str(link))),
    ):
        pass


@config
class PlacedSource:
    """Text at a place."""

    path: str | tuple[str, ...]
    data_dir: str = ""
    split: str = "line"


@config
class PlacedDomain:
    """Text with a name."""

    name: str
    source: PlacedSource
    evaluation: PlacedSource | None = None


@config
class PlacedData:
    """Texts, and the place of a tokenizer."""

    train: tuple[PlacedDomain, ...]
    tokenizer: PlacedSource = PlacedSource(path="a")
    path: str = "a"


@config
class PlacedExperiment:
    """An experiment on text."""

    output: str
    data: PlacedData

    def may_change(self, setting):
        return may_change(setting)


def placed(path, **settings):
    source = PlacedSource(path=path, **settings)
    return PlacedDomain(name="text", source=source, evaluation=source)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"train": (placed("b"),)}, None),
        ({"train": (placed(("b", "c")),)}, None),
        ({"train": (placed("a", data_dir="b"),)}, None),
        ({"tokenizer": PlacedSource(path="b")}, None),
        ({"train": (placed("a", split="file"),)}, r"source\.split"),
        ({"train": (placed("a"), placed("a"))}, r"data\.train\.1\.name"),
        ({"path": "b"}, r"data\.path"),
    ],
)
def test_text_may_lie_elsewhere_when_a_run_goes_on(tmp_path, change, refused):
    """What it holds is compared when it is read; here it is only the place."""
    data = PlacedData(train=(placed("a"),))
    experiment = PlacedExperiment(output=str(tmp_path / "run"), data=data)
    with lock_run_folder(experiment):
        pass
    moved = replace(experiment, data=replace(data, **change))
    if refused is None:
        with lock_run_folder(moved):
            pass
    else:
        with pytest.raises(UserError, match=refused), lock_run_folder(moved):
            pass


@pytest.mark.parametrize("url", ["nowhere://bucket/run", "https://bucket/run"])
def test_a_url_that_cannot_be_written_is_no_place_for_a_run(experiment, url):
    with (
        pytest.raises(UserError, match=r"output=.*: nowhere:// cannot be|can be written to https"),
        lock_run_folder(replace(experiment, output=url)),
    ):
        pass


def test_metrics_leave_out_a_line_that_a_crash_cut_off(experiment):
    with lock_run_folder(experiment) as folder:
        (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert folder.metrics() == [{"step": 1}, {"step": 2}]


def test_flatten_names_every_leaf():
    nested = {"a": {"b": [1, {"c": None}], "d": []}, "e": "text"}
    expected = {"a.b.0": 1, "a.b.1.c": None, "a.d": [], "e": "text"}
    assert flatten(nested) == expected
    assert json.dumps(nested)  # flatten leaves what it is given as it is


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00" * 20])
def test_a_file_of_results_that_is_none_is_told(experiment, text):
    """As a disk without power leaves it; the run is made again when it is gone."""
    with lock_run_folder(experiment) as folder:
        folder.write("results.json", text)
        with pytest.raises(UserError, match=r"results\.json is damaged: delete it"):
            folder.results()
        (folder.path / "results.json").unlink()
        assert folder.results() == {}
