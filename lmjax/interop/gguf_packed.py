"""Weights of GGUF files in few bits, read as ours in few bits: never a float of them.

Blocks of 32 neighbouring inputs, each with a scale d in float16 before it:

    Q8_0    w = n d of 32 integers n of 8 bits
    Q4_0    w = (n - 8) d of 32 integers n of 4 bits; byte j has n_j, and n_(j + 16) above it
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from lmjax.config import UserError, replace
from lmjax.interop.packed_integers import PackedWeight
from lmjax.interop.packed_reader import kept_parts
from lmjax.interop.tensor_names import Shapes, entries_of, theirs
from lmjax.models import Int4, Int8, Quantization, TransformerConfig, quantized_weights
from lmjax.models.gguf_layout import GGUFLayout
from lmjax.models.names import Name
from lmjax.models.number_codes import IntegerCode
from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import Grid, Stored

BLOCK = 32
CODES = {
    code: kind(block=BLOCK, scales="float16") for code, kind in (("Q8_0", Int8), ("Q4_0", Int4))
}


def in_few_bits(
    layout: GGUFLayout, config: TransformerConfig, paths: Shapes, kinds: dict[str, str]
) -> TransformerConfig:
    """The config that keeps weights as a file has them, or floats where there is none.

    There is one where all layers have the same ones in the same few bits; and of tables, where all
    have them too.

    Args:
      layout: of the file.
      config: of its model.
      paths: its parameters in float32, by dotted path.
      kinds: of the tensors, by name.
    """
    found: dict[str, set[str]] = {}
    for name, index in entries_of(layout, config, paths):
        for path in name.ours:
            found.setdefault(path, set()).add(kinds.get(theirs(name, index, config), ""))
    kept = {path: kinds for path, kinds in found.items() if not kinds.isdisjoint(CODES)}
    for kind, code in CODES.items():
        blocks = {
            path for path, own in kept.items() if own == {kind} and path.startswith("blocks.")
        }
        tables = {path for path, own in kept.items() if own == {kind}} - blocks
        layers = tuple(sorted(p.removeprefix("blocks.").removesuffix(".weight") for p in blocks))
        for named in (("*",), layers) if layers else ():
            for table in (code, None):
                quantization = Quantization(weights=code, layers=named, tables=table)
                try:
                    small = replace(config, quantization=quantization)
                    ours = {".".join(path) for path in quantized_weights(small)}
                except UserError:  # what such a model cannot have
                    continue
                if ours == blocks | (tables if table else set()):
                    return small
    return config


def read_kept(
    name: Name, forms: dict[str, WeightForm], tensor: Any, shape: tuple[int, ...]
) -> list[Stored] | None:
    """Arrays that are kept of each of our parts of a tensor; None: of some they are floats.

    Args:
      name: the line of the map.
      forms: of our weights by dotted path.
      tensor: as the library has it.
      shape: of its numbers.
    """
    found, code = [forms.get(path) for path in name.ours], CODES.get(tensor.tensor_type.name)
    if code is None or any(form is None or form.code != code for form in found):
        return None
    n, scale = integers(tensor.data, code, shape)
    if found[0].stack:  # rows of a table, or the matrices of experts
        return [_stack_kept(found[0], n, scale)]
    zero = np.full(scale.T.shape, -code.lowest)
    return kept_parts(name, found, PackedWeight(code.bits, n.T, zero, scale.T), tensor.name)


def integers(
    data: UInt8[np.ndarray, "..."], code: IntegerCode, shape: Collection[int]
) -> tuple[UInt8[np.ndarray, "*shape"], Float[np.ndarray, "..."]]:
    """Integers from 0 on of the blocks of a tensor, and the scales of its blocks in float16."""
    *rows, size = shape
    blocks = np.asarray(data).reshape(*rows, size // BLOCK, -1)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    n = blocks[..., 2:]
    if code.bits == 8:
        n = n ^ np.uint8(128)  # n + 128 of a signed n
    else:
        n = np.concatenate((n & np.uint8(15), n >> np.uint8(4)), axis=-1)
    return n.reshape(*rows, size), scale


@functools.partial(jax.jit, static_argnums=0)
def _stack_kept(form: WeightForm, n: jax.Array, scale: jax.Array) -> Stored:
    """The arrays of a stack, cut over the mesh as they are at rest; of further rows they are 0."""
    n = n.astype(jnp.float32) + form.code.lowest
    rows = form.matrix_shape[0] - len(n)
    n, scale = (jnp.pad(a, [(0, rows)] + [(0, 0)] * (a.ndim - 1)) for a in (n, scale))
    return form.cut(form.code.stored(n, Grid(scale.astype(jnp.float32)), form.axis))
