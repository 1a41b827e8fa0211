"""kill -9, and go on: the run ends with the bits and the lines of one that was left alone.

`python -m benchmarks.kill` does the same twenty times with a longer run.
"""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STEPS, EVERY = 24, 4
# As little as still has every part: start, steps, checkpoints, evaluation, report.
SMALL = (
    "evaluation.every=12",
    "evaluation.prompts=()",
    "evaluation.tokens=500",
    "data.length=16",
    "data.batch_size=4",
    "model.max_length=16",
    "model.num_layers=1",
    "model.hidden=16",
    "model.attention.num_heads=2",
    "model.attention.head_dim=8",
    "model.feed_forward.size=32",
)


@pytest.fixture
def kill(monkeypatch):
    """The benchmark's module; and one device for the processes it starts."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    return importlib.import_module("benchmarks.kill")


def test_killed_run_ends_as_one_left_alone(kill, tmp_path):
    """Exactly, since nothing is computed in another way: same machine, same programs."""
    training = kill.Training(STEPS, EVERY, tmp_path / "caches", SMALL)
    usual = kill.undisturbed(training, tmp_path / "alone")
    moments = [
        kill.Moment("checkpoint", step=6, share=0.5),
        kill.Moment("start", step=6, share=0.9),
        kill.Moment("step", step=14, share=0.5),
    ]
    kills = kill.survive(training, tmp_path / "killed", moments, usual)
    assert kills[0].half_written
    assert kills[2].logged >= 14
    assert kill.differences(tmp_path / "alone", tmp_path / "killed", STEPS) == []


def test_differences_are_found(kill, tmp_path):
    """Of a bit, of a line that is missing, and of one that stands there twice."""
    raise NotImplementedError
