"""kill -9, and go on: the run ends with the bits and the lines of one that was left alone.

`python -m benchmarks.kill` does the same twenty times with a longer run.
"""

import importlib
import json
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STEPS, EVERY = 24, 4
# As little as still has every part: start, steps, checkpoints, evaluation, report.
SMALL = (
    "data.train.0.source=TextFiles",
    f"data.train.0.source.path={ROOT}/lmjax/models/*.py",
    "data.held_out=0.3",
    "data.length=16",
    "data.batch_size=4",
    "model.max_length=16",
    "model.num_layers=1",
    "model.hidden=16",
    "model.attention.num_heads=2",
    "model.attention.head_dim=8",
    "model.feed_forward.size=32",
    "evaluation.every=12",
    "evaluation.prompts=()",
    "evaluation.tokens=500",
)


@pytest.fixture(autouse=True)
def one_device_beside_the_repository(monkeypatch):
    """Lets benchmarks be imported, and gives the processes they start one device."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")


@pytest.fixture
def same_run():
    return importlib.import_module("benchmarks.same_run")


def test_killed_run_ends_as_one_left_alone(same_run, tmp_path):
    """Exactly, since nothing is computed in another way: same machine, same programs."""
    kill = importlib.import_module("benchmarks.kill")
    training = kill.Training(STEPS, EVERY, tmp_path / "caches", SMALL)
    usual = kill.undisturbed(training, tmp_path / "alone")
    moments = [
        kill.Moment("checkpoint", step=6, share=0.5),
        kill.Moment("step", step=14, share=0.5),
    ]
    kills = kill.survive(training, tmp_path / "killed", moments, usual)
    assert kills[0].half_written
    assert kills[1].logged >= 14
    assert same_run.differences(tmp_path / "alone", tmp_path / "killed", STEPS) == []


@pytest.fixture
def finished(tmp_path):
    """Two equal folders as of finished runs, but for the arrays."""
    for name in ("alone", "killed"):
        write(tmp_path / name, [(1, 3.5), (2, 3.25)])
    return tmp_path / "alone", tmp_path / "killed"


def write(folder, losses):
    folder.mkdir(exist_ok=True)
    lines = [
        {"step": step, "split": "train", "loss": loss, "tokens_per_second": random.random()}
        for step, loss in losses
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([(1, 3.5), (2, 3.25)], []),
        ([(1, 3.5), (2, 3.250001)], ["metrics of (2, 'train')"]),
        ([(1, 3.5)], ["killed: the lines of the steps", "metrics of (2, 'train')"]),
        ([(1, 3.5), (2, 3.25), (2, 3.25)], ["killed: 1 lines", "killed: the lines of the steps"]),
    ],
)
def test_differences_of_lines_are_found(same_run, finished, monkeypatch, losses, found):
    """Timing may differ, a loss may not; no line may be missing or stand there twice."""
    monkeypatch.setattr(same_run, "final_state", lambda output, step: {"weight": b"1"})
    write(finished[1], losses)
    differences = same_run.differences(*finished, 2)
    assert len(differences) == len(found)
    assert all(line.startswith(start) for line, start in zip(differences, found))


def test_differences_of_bits_are_found(same_run, finished, monkeypatch):
    """An array that differs, and one that only one run has."""
    states = {
        "alone": {"weight": b"1", "bias": b"0"},
        "killed": {"weight": b"2", "scale": b"0"},
    }
    monkeypatch.setattr(same_run, "final_state", lambda output, step: states[output.name])
    arrays, weight = same_run.differences(*finished, 2)
    assert "bias" in arrays and "scale" in arrays
    assert weight.startswith("weight")
