"""Safetensors files, read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lmjax.config import UserError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


class TensorFiles(contextlib.ExitStack):
    """The tensors of a folder by name, whether they lie in one file or in several.

    A context: the files are memory-mapped while it is open. Nothing is ever unpickled.
    """

    def __init__(self, folder: Path):
        """Opens the files of `folder`; UserError where there are none or one is damaged."""
        super().__init__()
        self.folder = folder
        self._files = {}
        with contextlib.ExitStack() as undo:
            undo.push(self)
            for name in self._file_names():
                file = self._open(folder / name)
                self._files |= dict.fromkeys(file.keys(), (name, file))
            undo.pop_all()

    def _file_names(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            try:
                index = json.loads((self.folder / INDEX).read_text("utf-8"))
                return sorted(set(index["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self.folder / INDEX} is damaged: it has no weight_map") from None
        if (self.folder / FILE).is_file():
            return [FILE]
        if any(self.folder.glob("*.bin")):
            raise UserError(
                f"{self.folder} holds weights only as .bin files, which are pickles and can run"
                " code; convert them to safetensors where they come from"
            )
        raise UserError(f"{self.folder} holds neither {FILE} nor {INDEX}")

    def _open(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            return self.enter_context(safe_open(path, "numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut off: {error}") from None

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def where(self, name: str) -> str:
        """The file and the tensor's name, for messages."""
        return f"{self.folder / self._files[name][0]}: {name}"

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it. UserError where it holds no floating point."""
        part = self._files[name][1].get_slice(name)
        if part.get_dtype() not in FLOATS:
            raise UserError(
                f"{self.where(name)} holds {part.get_dtype()}, not one of {', '.join(FLOATS)}"
            )
        return tuple(part.get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        return self._files[name][1].get_tensor(name).astype(np.float32)


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file of float32 tensors, whole or not at all.

    Args:
      path: the file.
      shapes: names and shapes in order.
      tensors: the tensors in the same order; each is let go before the next is asked for.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                file.write(np.ascontiguousarray(tensor, "<f4").data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
