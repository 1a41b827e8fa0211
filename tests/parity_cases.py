"""Where the parity cases lie: tiny models with the outputs of independent implementations."""

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent / "data" / "parity"
# Families that transformers still has can be compared with it live: not all are in the repository.
SHARED = Path(__file__).parents[2] / "shared" / "parity"
KEPT = tempfile.TemporaryDirectory(prefix="lmjax-parity-")  # until the process ends


def parity_folder(name: str) -> Path:
    """The folder of a case; the test is skipped where it is not."""
    folder = next((root / name for root in (HERE, SHARED) if (root / name).is_dir()), None)
    if folder is None:
        pytest.skip(f"the parity case {name} is not here: {HERE / name} or {SHARED / name}")
    return folder


@functools.cache
def finished_folder(name: str) -> Path:
    """The folder of a case; of a training, one with its final weights."""
    folder = parity_folder(name)
    if not (folder / "final.safetensors").is_file():
        return folder
    made = Path(KEPT.name) / name
    made.mkdir()
    shutil.copy(folder / "config.json", made)
    shutil.copy(folder / "final.safetensors", made / "model.safetensors")
    return made


def with_older_names(folder: Path) -> None:
    """Writes the tensors of a GPT-2 or a LLaMA as older public files have them.

    GPT-2: without the prefix, and with the causal masks; LLaMA: with the frequencies of its rotary
    positions.
    """
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): a for name, a in load_file(path).items()}
    for name in list(tensors):
        block = name.removesuffix("attn.c_attn.weight")
        if block != name:
            length = tensors["wpe.weight"].shape[0]
            tensors[f"{block}attn.bias"] = np.tri(length, dtype=np.float32)[None, None]
        block = name.removesuffix("q_proj.weight")
        if block != name:
            half = np.arange(6, dtype=np.float32) / 6  # of heads of 12
            tensors[f"{block}rotary_emb.inv_freq"] = (10_000.0**-half).astype(np.float32)
    save_file(tensors, path, {"format": "pt"})
