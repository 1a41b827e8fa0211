"""Runs a folder of StableHLO programs with jax alone: see `test_stablehlo.py`.

python run_stablehlo.py FOLDER PROMPTS.json
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file


class Programs:
    """The programs of a folder, and its weights."""

    def __init__(self, folder):
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.weights = {}
        for path in folder.glob("*.safetensors"):
            self.weights |= jax.device_put(load_file(path))
        self.call = {}
        for name, program in self.manifest["programs"].items():
            data = bytearray((folder / program["file"]).read_bytes())
            self.call[name] = jax.jit(jax.export.deserialize(data).call)

    def cache(self, **sizes):
        """An empty cache with these numbers of rows (batch) and of their tokens (room)."""
        arrays = self.manifest["programs"]["prefill"]["cache"]
        return {
            name: jnp.zeros([sizes.get(size, size) for size in a["shape"]], a["dtype"])
            for name, a in arrays.items()
        }


def padded(rows):
    """Rows of tokens that end together, as inputs by name."""
    length = max(map(len, rows))
    segments = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int32)
    tokens = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
    positions = np.maximum(segments.cumsum(axis=1, dtype=np.int32) - 1, 0)
    return {"tokens": tokens, "positions": positions, "segments": segments}


def greedy(programs, given, count):
    """The most likely tokens behind each row, and the logits that they were chosen by."""
    rows, columns = given["tokens"].shape
    cache = programs.cache(batch=rows, room=columns + count)
    logits, cache = programs.call["prefill"](programs.weights, cache, given)
    found = []
    for _ in range(count):
        found.append(logits)
        inputs = {"tokens": logits.argmax(-1).astype(np.int32), "going": np.ones(rows, bool)}
        logits, cache = programs.call["step"](programs.weights, cache, inputs)
    return np.stack(found, axis=1)


if __name__ == "__main__":
    folder, prompts = map(Path, sys.argv[1:])
    asked = json.loads(prompts.read_text())
    given = {name: np.array(a, np.int32) for name, a in padded(asked["rows"]).items()}
    given |= {name: np.array(a, np.int32) for name, a in asked.get("inputs", {}).items()}
    programs = Programs(folder)
    if "read" in programs.call:
        out = programs.call["read"](programs.weights, given)
        np.savez(folder / "found.npz", **out)
    else:
        np.savez(folder / "found.npz", logits=greedy(programs, given, asked["count"]))
    assert not any(name.split(".")[0] in ("lmjax", "pallas_kernels") for name in sys.modules)
