"""Commands of several processes write what those of one write."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from pytest import approx

from lmjax.generation import Sampling, load
from lmjax.interop.convert import convert
from lmjax.launch.watch import LOST
from lmjax.parallel import Mesh
from lmjax.runs import manifest
from lmjax.runs.array_files import read_arrays

ROOT = Path(__file__).parents[3]
SETTINGS = (
    "steps=8",
    "mesh.data=2",
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
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONFAULTHANDLER": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(folder: Path, devices: int, **environment: str) -> subprocess.Popen:
    words = "experiments.debug", f"output={folder}", *SETTINGS
    return start(*words, devices=devices, **environment)


def pair(command, *arguments, devices: int = 2) -> list[subprocess.Popen]:
    """A command in two processes of so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        command(*arguments, devices=devices, **several, JAX_PROCESS_ID=str(index))
        for index in range(2)
    ]


def outcome(*processes: subprocess.Popen) -> list[str]:
    """Their stdout, which is Python's alone, once they have come to a good end.

    Those that have not after five minutes are ended, and what all their threads do is shown.
    """
    printed = []
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        ended = [pool.submit(process.communicate) for process in processes]
        late = concurrent.futures.wait(ended, timeout=300).not_done
        for process in processes if late else ():
            process.send_signal(signal.SIGABRT)  # faulthandler writes their stacks
    for process, future in zip(processes, ended, strict=True):
        out, err = future.result()
        assert process.returncode == 0, (out + (err or ""))[-5000:]
        printed.append(out)
    return printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run of one process, and of one of two."""
    folder = tmp_path_factory.mktemp("runs")
    outcome(*pair(train, folder / "two", devices=4))
    outcome(train(folder / "one", devices=8))
    return folder / "one", folder / "two"


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock and the machine's memory."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    measured = ("tokens_per_second", "mfu", "peak_memory")
    return [{name: v for name, v in line.items() if name not in measured} for line in lines]


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by their names."""
    names = manifest.read(folder / "checkpoints" / str(step))["arrays"]
    wanted = {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        for name, (shape, dtype) in names.items()
        if name != "key"
    }
    found = read_arrays(folder / "checkpoints" / str(step) / "arrays", wanted)
    return {name: np.asarray(a) for name, a in found.items()}


def test_two_processes_train_as_one(runs):
    """Two processes of four devices, and one of eight: all metrics, and all arrays of checkpoints.

    To 1e-5: sums over devices are taken in another order between processes. Adam divides by the
    root of small numbers, so of parameters after 8 steps less of the error's size is known.
    """
    one, two = map(numbers, runs)
    assert [line.keys() for line in two] == [line.keys() for line in one]
    assert len([line for line in one if line["split"] == "train"]) == 8
    for first, second in zip(one, two, strict=True):
        for name, value in first.items():
            assert second[name] == (value if isinstance(value, str) else approx(value, rel=1e-5))
    assert sorted(path.name for path in (runs[0] / "checkpoints").iterdir()) == ["4", "8"]
    for step in (4, 8):
        first, second = (arrays(folder, step) for folder in runs)
        assert first.keys() == second.keys()
        for name, value in first.items():
            # The bias of keys shifts all scores of a query alike, and has no gradient but rounding,
            # which Adam divides by its own size.
            atol = 1e-4 if name.endswith("key.bias") else 1e-5
            np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_after_one_process_was_killed(runs, tmp_path):
    """The other one ends by itself, and the same command continues both."""
    processes = pair(train, tmp_path / "killed", devices=4)
    lines = tmp_path / "killed" / "metrics.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) < 6:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].kill()
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == LOST and "process 1 of 2" in err
    processes[1].communicate()
    outcome(*pair(train, tmp_path / "killed", devices=4))
    assert numbers(tmp_path / "killed") == numbers(runs[1])
    first, second = arrays(tmp_path / "killed", 8), arrays(runs[1], 8)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_mistake_ends_both(runs):
    """The second process does not wait for a first one that has gone."""
    words = "experiments.debug", f"output={runs[1]}", *SETTINGS, "seed=5"
    processes = pair(start, *words, devices=4)
    first, second = (process.communicate(timeout=300)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "holds another run" in first and "the first process has ended" in second
