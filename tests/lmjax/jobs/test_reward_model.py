"""A job of another kind than pretraining, on the base of all jobs: trained, killed and resumed."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.jobs.results import Results
from lmjax.parallel import Mesh
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from tests.lmjax.jobs import reward_model
from tests.lmjax.jobs.reward_experiment import experiment

ROOT = Path(__file__).parents[3]
# kill -9 when the line of a step has been written, after which two checkpoints were begun.
KILLED = """
import os, signal, sys
from lmjax.launch import run
from lmjax.runs.metrics import MetricsWriter
from tests.lmjax.jobs.reward_experiment import experiment
write = MetricsWriter.write
def killing(self, record):
    write(self, record)
    if record["step"] == 15:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsWriter.write = killing
run(experiment)
"""


def start(folder, *command):
    """Runs the job in a process of its own, on one device."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command, f"output={folder}"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    ended = start(folder, "-m", "tests.lmjax.jobs.reward_experiment")
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


def lines(folder):
    """The lines of metrics.jsonl, without what depends on the clock."""
    timing = ("tokens_per_second", "mfu", "peak_memory")
    return [
        {name: value for name, value in record.items() if name not in timing}
        for record in RunFolder(folder).metrics()
    ]


def test_it_learns_to_rank(alone):
    folder, told = alone
    scores = [record for record in lines(folder) if record["split"] == "held_out/pairs"]
    assert [record["step"] for record in scores] == [10, 20]
    assert scores[-1]["accuracy"] > 0.9  # half of them by chance
    (table,) = Results.from_json(RunFolder(folder).results()).tables
    assert table.rows == (("pairs", scores[-1]["accuracy"]),)
    assert "Pair accuracy" in told and "accuracy 1.0000" in told
    assert "Pair accuracy" in (folder / "report.html").read_text("utf-8")


def test_killed_and_resumed_it_has_the_same_bits(alone, tmp_path):
    killed = tmp_path / "run"
    assert start(killed, "-c", KILLED).returncode == -signal.SIGKILL
    saved = Checkpointer(RunFolder(killed).checkpoints).steps()
    assert saved in ([6], [6, 12])  # the second may be half written
    ended = start(killed, "-m", "tests.lmjax.jobs.reward_experiment")
    assert ended.returncode == 0, ended.stderr
    assert f"after step {saved[-1]}" in ended.stdout
    assert lines(killed) == lines(alone[0])
    for one, other in zip(arrays(killed), arrays(alone[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def arrays(folder):
    """All arrays of the last checkpoint but the random key."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        shapes = experiment.learner().abstract()
        state, extra = Checkpointer(RunFolder(folder).checkpoints).restore(None, shapes)
    assert extra["step"] == state.step == 20
    return [np.asarray(a) for a in jax.tree.leaves((state.params, state.optimizer))]


def test_an_evaluator_of_the_end_alone_gives_lines_and_tables(tmp_path):
    """Also where the run was stopped between its last step and its results."""
    job = replace(
        experiment,
        output=str(tmp_path / "run"),
        steps=4,
        evaluators=(reward_model.PairAccuracy(),),
    )
    folder = RunFolder(job.output)
    job.run()
    (record,) = [line for line in lines(folder.path) if line["split"] == "held_out/pairs"]
    (table,) = Results.from_json(folder.results()).tables
    assert record["step"] == 4 and table.rows == (("pairs", record["accuracy"]),)
    before = lines(folder.path)
    (folder.path / "results.json").unlink()
    replace(job, evaluators=(reward_model.PairAccuracy(every=3),)).run()
    assert Results.from_json(folder.results()).tables == (table,)
    assert lines(folder.path) == before


def test_an_interval_is_a_number_of_steps():
    with pytest.raises(UserError, match="every=0: it must be at least 1"):
        reward_model.PairAccuracy(every=0)


def test_it_needs_nothing_of_pretraining():
    text = Path(reward_model.__file__).read_text("utf-8")
    assert len(text.splitlines()) <= 90
    imported = {
        node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
    }
    assert not {"lmjax.jobs.pretrain", "lmjax.jobs.text", "lmjax.data"} & imported
