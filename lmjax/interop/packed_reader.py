"""Weights of public folders in few bits, read as ours in few bits: never a float of them.

Integers with scales and zeros of groups of neighbouring inputs mean the same there and here
(`lmjax.models.number_codes`), so each number goes over as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import UserError, replace
from lmjax.interop.packed_files import PackedFiles
from lmjax.interop.packed_integers import PackedGrid, PackedWeight
from lmjax.interop.tensor_files import TensorFiles
from lmjax.interop.tensor_names import Shapes, entries_of, theirs, titles_of
from lmjax.models import Int4, Int8, Quantization, TransformerConfig, quantized_weights
from lmjax.models.family import ModelFamily
from lmjax.models.names import Grouped, Matrix, Name, Transform
from lmjax.models.number_codes import IntegerCode
from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import Grid, Stored

CODES = {4: Int4, 8: Int8}  # by bits


class _NotOurs(Exception):
    """Signal with the reason why a folder's weights can be read as floats alone."""


def with_packed(
    family: ModelFamily, config: TransformerConfig, paths: Shapes, files: TensorFiles
) -> tuple[TransformerConfig, str]:
    """The config whose weights are kept as the folder has them.

    Args:
      family: of the folder.
      config: of its model.
      paths: its parameters in float32, by dotted path.
      files: its tensors.

    Returns:
      The config, and the reason why it keeps floats although the folder has packed weights; empty:
      it has none, or the config keeps them.
    """
    if not isinstance(files, PackedFiles) or not files.packed:
        return config, ""
    try:
        code = code_of(files)
        packed = _packed_paths(family, config, paths, files)
        layers = tuple(sorted({_in_block(path) for path in packed}))
        for named in (("*",), layers):
            quantization = Quantization(weights=code, layers=named)
            small = replace(config, quantization=quantization)
            if {".".join(path) for path in quantized_weights(small)} == packed:
                return small, ""
        raise _NotOurs("no setting is for the layers that are packed")
    except _NotOurs as reason:
        return config, str(reason)
    except UserError as error:  # what such a model cannot have
        return config, str(error)


def code_of(files: PackedFiles) -> IntegerCode:
    """The way to keep weights that all packed ones of a folder fit. _NotOurs: there is none."""
    form = files.form
    if form.bits not in CODES:
        raise _NotOurs(f"weights of {form.bits} bits are none of ours, which have 4 or 8")
    code = CODES[form.bits](block=form.block, symmetric=form.symmetric, scales="float16")
    grids = {}
    for name in sorted(files.packed):
        if files.keeps_floats(name):
            raise _NotOurs(f"{name} is of floats of 8 bits")
        grids[name] = grid = files.grid(name)
        if np.any(grid.zero != 2 ** (form.bits - 1)):
            code = replace(code, symmetric=False)
        if grid.scale.dtype != np.float16:
            code = replace(code, scales="float32")
    for name, grid in grids.items():
        if reason := misfit(code, grid, files.shape(name).shape[1]):
            raise _NotOurs(f"{name}: {reason}")
    return code


def misfit(code: IntegerCode, grid: PackedGrid, inputs: int) -> str:
    """The reason why a code cannot keep integers with this grid; empty: it can."""
    size = code.of(inputs)
    if grid.group is not None and np.any(grid.group != np.arange(inputs) // size):
        return "inputs that share a scale are no neighbours (act-order)"
    if len(grid.scale) != -(-inputs // size) or (len(grid.scale) > 1 and inputs % size):
        return f"{len(grid.scale)} groups of {size} are not its {inputs} inputs"
    if code.symmetric and np.any(grid.zero != -code.lowest):
        return "zeros are not in the middle"
    if code.scales == "float16" and grid.scale.dtype != np.float16:
        return f"scales are {grid.scale.dtype}"
    return ""


def read_packed(
    name: Name, forms: Mapping[str, WeightForm], files: TensorFiles, title: str
) -> list[Stored] | None:
    """Arrays that are kept of each of our parts of one of their weights.

    Args:
      name: the line of the map.
      forms: of our weights by dotted path.
      files: the folder's tensors.
      title: the weight's name there.

    Returns:
      None where the weight is not packed, or not as the forms want it.
    """
    found = [forms.get(path) for path in name.ours]
    if not isinstance(files, PackedFiles) or title not in files.packed or None in found:
        return None
    weight = files.integers(title)
    if weight is None or any(not _takes(form, weight) for form in found):
        return None
    return kept_parts(name, found, weight, title)


def kept_parts(
    name: Name, forms: Sequence[WeightForm], weight: PackedWeight, title: str
) -> list[Stored]:
    """Arrays that are kept of each of our parts of a packed weight, whose forms have its codes."""
    transform = of_matrices(name.transform, title)
    outputs = [tuple(size for _, size in form.outputs) for form in forms]

    def cut(lines: np.ndarray) -> list[np.ndarray]:
        parts = transform.read(lines.T, [(len(lines), *own) for own in outputs])
        return [np.ascontiguousarray(part.reshape(len(lines), -1)) for part in parts]

    parts = zip(cut(weight.n), cut(weight.scale), cut(weight.zero.astype(np.uint8)), strict=True)
    # Of a stack of experts it is one.
    ones = [dataclasses.replace(form, stack=()) for form in forms]
    return [_kept(form, *part) for form, part in zip(ones, parts, strict=True)]


def of_matrices(transform: Transform, title: str) -> Transform:
    """The transform for weights whose inputs are one axis. UserError for what is no such weight."""
    if isinstance(transform, Matrix) and transform.transposed:
        return dataclasses.replace(transform, inputs=1)
    if isinstance(transform, Grouped):
        return transform
    raise UserError(
        f"{title}: these formats are for dense layers of PyTorch's; models of this family can be"
        " written as to=run"
    )


def _takes(form: WeightForm, weight: PackedWeight) -> bool:
    code = form.code
    same = isinstance(code, IntegerCode) and code.bits == weight.bits
    return same and not misfit(code, weight.grid, len(weight.n))


@functools.partial(jax.jit, static_argnums=0)
def _kept(form: WeightForm, n: jax.Array, scale: jax.Array, zero: jax.Array) -> Stored:
    """The arrays of a matrix [in, out], cut over the mesh as they are at rest."""
    code: IntegerCode = form.code
    grid = Grid(scale.astype(jnp.float32), None if code.symmetric else zero.astype(jnp.float32))
    return form.cut(form.turned(code.stored(n.astype(jnp.float32) + code.lowest, grid, 0)))


def _packed_paths(
    family: ModelFamily, config: TransformerConfig, paths: Shapes, files: PackedFiles
) -> set[str]:
    """Our weights of the blocks that are packed there. _NotOurs: some layers have floats."""
    found: dict[str, set[bool]] = {}
    for name, index in entries_of(family, config, paths):
        titles = titles_of(family, theirs(name, index, config))
        packed = not files.packed.isdisjoint(titles)
        if packed and ".blocks." in f".{name.ours[0]}":
            of_matrices(name.transform, titles[0])
        for path in name.ours:
            if ".blocks." in f".{path}":
                found.setdefault(path, set()).add(packed)
    mixed = sorted(path for path, kinds in found.items() if len(kinds) > 1)
    if mixed:
        raise _NotOurs(f"some layers have floats: {_in_block(mixed[0])} is packed in others alone")
    return {path for path, kinds in found.items() if kinds == {True}}


def _in_block(path: str) -> str:
    """The path of a weight's layer in its block."""
    return path.rpartition("blocks.")[2].removesuffix(".weight")
