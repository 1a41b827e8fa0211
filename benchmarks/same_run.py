"""Comparison of two finished runs, bit for bit and line for line."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.parallel import Mesh
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder

FIELDS = ("loss", "gradient_norm", "learning_rate", "bits_per_byte")  # that must agree, where given


def differences(alone: Path, killed: Path, steps: int) -> list[str]:
    """Differences of two finished runs of that many steps."""
    found = []
    numbers = []
    for output in (alone, killed):
        lines = RunFolder(output).metrics()
        rows = {(line["step"], line["split"]): _numbers(line) for line in lines}
        if len(rows) < len(lines):
            found.append(f"{output.name}: {len(lines) - len(rows)} lines stand there twice")
        trained = [line["step"] for line in lines if line["split"] == "train"]
        if trained != list(range(1, steps + 1)):
            found.append(f"{output.name}: the lines of the steps are not 1, 2, ... {steps}")
        numbers.append(rows)
    for line in sorted(numbers[0].keys() | numbers[1].keys()):
        one, other = (rows.get(line) for rows in numbers)
        if one != other:
            found.append(f"metrics of {line}: {one} and {other}")
    one, other = (final_state(output, steps) for output in (alone, killed))
    if one.keys() != other.keys():
        found.append(f"arrays {sorted(one.keys() ^ other.keys())} are in only one of the runs")
    found += [f"{name} differs" for name in one.keys() & other.keys() if one[name] != other[name]]
    return found


def final_state(output: Path, step: int) -> dict[str, bytes]:
    """The bits of every array of a run's last checkpoint, by name."""

    def bits(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    folder = RunFolder(output)
    with (
        jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])),
        Checkpointer(folder.checkpoints) as checkpointer,
    ):
        state, _ = checkpointer.restore(step, folder.experiment().learner().abstract())
        leaves, _ = jax.tree.flatten_with_path(state)
        return {jax.tree_util.keystr(path): bits(leaf) for path, leaf in leaves}


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in FIELDS if name in line}
