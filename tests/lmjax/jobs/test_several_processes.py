"""Commands of several processes write what those of one write."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.generation import Sampling, load
from lmjax.interop.convert import convert
from lmjax.parallel import Mesh

ROOT = Path(__file__).parents[3]
SETTINGS = (
    "steps=8",
    "mesh.fsdp=2",
    "mesh.tensor=2",
    "data.train.0.source=TextFiles",
    f"data.train.0.source.path={ROOT}/lmjax/models/*.py",
    "data.held_out=0.3",
    "data.length=16",
    "model.max_length=16",
    "model.num_layers=1",
    "evaluation.every=4",
    "evaluation.prompts=()",
    "evaluation.tokens=500",
    "checkpoint.every=4",
)


def start(*words: str, devices: int, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(folder: Path, devices: int, **environment: str) -> subprocess.Popen:
    words = "experiments.debug", f"output={folder}", *SETTINGS
    return start(*words, devices=devices, **environment)


def pair(command, *arguments) -> list[subprocess.Popen]:
    """A command in two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        command(*arguments, devices=2, **several, JAX_PROCESS_ID=str(index)) for index in range(2)
    ]


def outcome(*processes: subprocess.Popen) -> list[str]:
    """Their stdout, which is Python's alone, once they have come to a good end."""
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, (out + err)[-3000:]
        printed.append(out)
    return printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run of one process, and of one of two."""
    folder = tmp_path_factory.mktemp("runs")
    outcome(*pair(train, folder / "two"))
    outcome(train(folder / "one", devices=4))
    return folder / "one", folder / "two"


def numbers(folder: Path) -> list[tuple]:
    """Step, split and loss of each line."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["split"], line["loss"]) for line in map(json.loads, lines)]


def test_two_processes_train_as_one(runs):
    """To 1e-5: sums over devices are taken in another order between processes."""
    one, two = map(numbers, runs)
    assert [line[:2] for line in two] == [line[:2] for line in one]
    assert len([line for line in one if line[1] == "train"]) == 8
    np.testing.assert_allclose([line[2] for line in two], [line[2] for line in one], rtol=1e-5)


def test_two_processes_write_the_text_of_one(runs):
    words = "lmjax.generation", str(runs[0]), "prompt=def", "temperature=0", "max_tokens=12"
    first, second = outcome(*pair(start, *words, "mesh.tensor=2"))
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        [text] = load(runs[0]).generate(["def"], Sampling(temperature=0.0), 12)
    assert (first, second) == (f"def{text}\n", "")


@pytest.mark.slow
def test_two_processes_convert_as_one(runs, tmp_path):
    """A model folder has the same bytes, and so have the weights of one that was a run since."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        convert(runs[0], tmp_path / "alone")
    outcome(*pair(start, "lmjax.interop", str(runs[0]), str(tmp_path / "public"), "mesh.fsdp=4"))
    outcome(*pair(start, "lmjax.interop", str(tmp_path / "public"), str(tmp_path / "run")))
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        convert(tmp_path / "run", tmp_path / "again")
    for path in sorted((tmp_path / "alone").iterdir()):
        assert (tmp_path / "public" / path.name).read_bytes() == path.read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (
        tmp_path / "alone" / weights
    ).read_bytes()


def test_a_mistake_ends_both(runs):
    """The second process does not wait for a first one that has gone."""
    words = "experiments.debug", f"output={runs[1]}", *SETTINGS, "seed=5"
    processes = pair(start, *words)
    first, second = (process.communicate(timeout=300)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "holds another run" in first and "the first process has ended" in second
