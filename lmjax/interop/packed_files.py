"""Tensors of a model folder whose weights are kept in few bits, read as floats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.interop.packed_formats import PackedFormat, format_of
from lmjax.interop.tensor_files import FLOATS, INTEGERS, Stored, TensorFiles


def open_tensors(folder: Path, settings: Mapping[str, Any]) -> TensorFiles:
    """The tensors of a folder by name, with the weights that are packed as what they stand for.

    Args:
      folder: where they are.
      settings: its config.json.

    Raises:
      UserError: see `TensorFiles`; or they are packed in a way that is not known.
    """
    packed = format_of(settings)
    return TensorFiles(folder) if packed is None else PackedFiles(folder, packed)


class PackedFiles(TensorFiles):
    """As `TensorFiles`; in place of the parts of a packed weight, `weight` in float32."""

    def __init__(self, folder: Path, form: PackedFormat):
        """Looks at what is in the files of `folder`, whose format is `form`."""
        super().__init__(folder)
        self.form = form
        marks = tuple(f".{mark}" for mark in form.marks)
        layers = {name.rpartition(".")[0] for name in self._stored if name.endswith(marks)}
        self._parts: dict[str, dict[str, Stored]] = {}
        for layer in layers:
            found = {part: self._stored.get(f"{layer}.{part}") for part in form.parts}
            found = {part: stored for part, stored in found.items() if stored is not None}
            self._check(layer, found)
            for part in found:
                del self._stored[f"{layer}.{part}"]
            first = next(iter(found.values()))
            self._parts[f"{layer}.weight"] = found
            # For messages; nobody reads it.
            self._stored[f"{layer}.weight"] = first

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """See `TensorFiles.shape`."""
        if name not in self._parts:
            return super().shape(name)
        parts = self._parts[name]
        if "weight_shape" in parts:
            shape = tuple(int(size) for size in parts["weight_shape"].read())
        else:
            shape = self.form.shape({part: stored.shape for part, stored in parts.items()})
        return jax.ShapeDtypeStruct(shape, np.float32)

    def read(self, name: str) -> np.ndarray:
        """See `TensorFiles.read`. UserError where the parts do not belong together."""
        if name not in self._parts:
            return super().read(name)
        try:
            return self.form.read({part: s.read() for part, s in self._parts[name].items()})
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"{self.where(name)} is damaged: {error}") from None

    def _check(self, layer: str, found: Mapping[str, Stored]) -> None:
        """Raises UserError for parts of a type that is not known."""
        for part, stored in found.items():
            if stored.dtype not in FLOATS | INTEGERS:
                raise UserError(
                    f"{self.folder / stored.file}: {layer}.{part} holds {stored.dtype}, not one of"
                    f" {', '.join(FLOATS | INTEGERS)}"
                )
