"""Tensors of a model folder whose weights are kept in few bits, read as floats."""

from __future__ import annotations

from collections.abc import Callable, KeysView, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.interop.packed_formats import PackedFormat, format_of
from lmjax.interop.packed_integers import PackedGrid, PackedWeight
from lmjax.interop.tensor_files import FLOATS, INTEGERS, Stored, TensorFiles

T = TypeVar("T")


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

    @property
    def packed(self) -> KeysView[str]:
        """Names of the weights that are packed."""
        return self._parts.keys()

    def read(self, name: str) -> np.ndarray:
        """See `TensorFiles.read`. UserError where the parts do not belong together."""
        if name not in self._parts:
            return super().read(name)
        return self._of_parts(name, self.form.read)

    def integers(self, name: str) -> PackedWeight | None:
        """The integers of a packed weight, as `read`; None: it is kept as floats of 8 bits."""
        return self._of_parts(name, self.form.integers)

    def grid(self, name: str) -> PackedGrid:
        """Scales and zeros of a packed weight, as `read`; its integers are not looked at."""
        return self._of_parts(name, self.form.grid, self.form.large)

    def keeps_floats(self, name: str) -> bool:
        """Returns whether a packed weight is kept as floats, of 8 bits."""
        large = [self._parts[name].get(part) for part in self.form.large]
        return not all(stored is None or stored.dtype in ("I32", "I8") for stored in large)

    def _of_parts(
        self, name: str, read: Callable[[dict[str, np.ndarray]], T], left: tuple[str, ...] = ()
    ) -> T:
        """Gives the parts of a weight to `read`, less those that are left out."""
        stored = {part: s for part, s in self._parts[name].items() if part not in left}
        try:
            return read({part: s.read() for part, s in stored.items()})
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
