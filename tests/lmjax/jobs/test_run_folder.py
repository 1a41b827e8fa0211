"""The run folder: made, continued, refused, locked, and never left half-made."""

import json
import os
import subprocess
import sys

import pytest

from lmjax.config import UserError, config, replace
from lmjax.jobs.run_folder import RunFolder, flatten, occupy


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


@pytest.fixture
def experiment(tmp_path):
    return FolderExperiment(output=str(tmp_path / "run"))


def test_the_config_in_the_folder_is_the_experiment(experiment):
    with occupy(experiment) as folder:
        assert folder.experiment() == experiment


def test_the_same_experiment_goes_on(experiment):
    for _ in range(2):
        with occupy(experiment):
            pass


@pytest.mark.parametrize("change", [{"steps": 20}, {"mesh": 8}])
def test_some_settings_may_change(experiment, change):
    with occupy(experiment):
        pass
    with occupy(replace(experiment, **change)) as folder:
        assert folder.experiment() == experiment  # until the job finds that it can go on


def test_another_experiment_is_refused_and_told_apart(experiment):
    with occupy(experiment):
        pass
    other = replace(experiment, part=FolderPart(width=5, sizes=(1, 3)))
    with pytest.raises(UserError) as refused, occupy(other):
        pass
    message = str(refused.value)
    assert "part.width: 4 in the folder, 5 now" in message
    assert "part.sizes.1: 2 in the folder, 3 now" in message
    assert "output=" in message
    assert RunFolder(experiment.output).experiment() == experiment


def test_a_folder_of_something_else_is_refused_untouched(experiment, tmp_path):
    os.mkdir(experiment.output)
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"), occupy(experiment):
        pass
    assert os.listdir(experiment.output) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", '{"class": "os.system"}', "[]"])
def test_a_config_that_is_none_is_refused(experiment, tmp_path, text):
    os.mkdir(experiment.output)
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"), occupy(experiment):
        pass
    assert (tmp_path / "run" / "config.json").read_text() == text


def test_a_mistake_in_a_new_run_leaves_nothing(experiment):
    with pytest.raises(UserError, match="no corpus"), occupy(experiment) as folder:
        folder.tokenizer.mkdir()
        raise UserError("no corpus")
    assert not os.path.exists(experiment.output)


def test_a_mistake_in_a_new_run_leaves_what_was_there(experiment, tmp_path):
    hidden = tmp_path / "run" / ".git"
    hidden.mkdir(parents=True)
    with pytest.raises(UserError), occupy(experiment):
        raise UserError("no corpus")
    assert os.listdir(experiment.output) == [".git"]


def test_a_mistake_in_a_run_with_a_checkpoint_leaves_it(experiment):
    with pytest.raises(UserError), occupy(experiment) as folder:
        (folder.checkpoints / "3").mkdir(parents=True)
        raise UserError("the loss is nan")
    with occupy(experiment) as folder:
        assert os.listdir(folder.checkpoints) == ["3"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write"),
        occupy(FolderExperiment(output=str(tmp_path / "file" / "run"))),
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
        with pytest.raises(UserError, match="another process"), occupy(experiment):
            pass
        other.stdin.close()
    with occupy(experiment):  # the system has freed the lock with the process
        pass


def test_metrics_leave_out_a_line_that_a_crash_cut_off(experiment):
    with occupy(experiment) as folder:
        (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert folder.metrics() == [{"step": 1}, {"step": 2}]


def test_flatten_names_every_leaf():
    nested = {"a": {"b": [1, {"c": None}], "d": []}, "e": "text"}
    expected = {"a.b.0": 1, "a.b.1.c": None, "a.d": [], "e": "text"}
    assert flatten(nested) == expected
    assert json.dumps(nested)  # flatten leaves what it is given as it is
