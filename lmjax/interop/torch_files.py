"""PyTorch's .bin files by its weights-only loader alone: they are pickles, and could run code."""

from __future__ import annotations

import warnings
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other kinds of pickle: what matters is said below
            state = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # the loader raises whatever a damaged or hostile file leads to
        raise UserError(
            f"{path} is damaged, or holds more than tensors: PyTorch's weights-only loader"
            f" refuses it ({_reason(error)})"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no tensors by name, but a {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: a tensor is called {name!r}, which is no name")
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name} is not a tensor ({type(tensor).__name__})")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(
                f"{path}: {name} is no plain tensor in memory ({tensor.layout}, {tensor.device})"
            )
    return state


def _reason(error: Exception) -> str:
    """Reason why the loader refuses a file, without its advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = (line.strip() for line in text.splitlines() if "weights_only" not in line)
    reason = next(filter(None, lines), "").partition(". ")[0]
    return reason if len(reason) > 3 else repr(error)  # of a KeyError the text is its key alone


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
