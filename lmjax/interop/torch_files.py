"""PyTorch's .bin files by its weights-only loader alone: they are pickles, and could run code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from lmjax.config import UserError

if TYPE_CHECKING:
    import torch

OLDEST = "2.6"  # before it the weights-only loader could be made to run code (CVE-2025-32434)


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, memory-mapped; files of before PyTorch 1.6 are read whole.

    Raises:
      UserError: there is no torch here, or one that is too old; the file is damaged, or holds
        anything but tensors.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a pickle, which only PyTorch's weights-only loader reads safely, and torch"
            " is not installed: pip install 'lmjax[torch]', or convert the file to safetensors"
            " where it comes from"
        ) from None
    if torch.__version__ < OLDEST:
        raise UserError(
            f"{path} needs torch {OLDEST} or newer, and {torch.__version__} is installed:"
            " the weights-only loader of older ones can be made to run code"
        )
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # the loader raises whatever a damaged or hostile file leads to
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} is damaged, or holds more than tensors; PyTorch's weights-only loader"
            f" refuses it: {reason}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no tensors by name, but a {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name} is not a tensor ({type(tensor).__name__})")
    return state


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array of the same memory."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def dtype_name(tensor: torch.Tensor) -> str:
    """The type as safetensors calls it, where it is one of floating point; else as torch does."""
    name = str(tensor.dtype).removeprefix("torch.")
    known = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return known.get(name, name)
