"""Products of a few rows with a weight of few bits on CPUs, where reading the weight is the cost.

XLA's CPU products of a weight that is made whole first write it to memory and read it again in
float32, some 8 times the bytes of what is kept. Here a piece of the weight that fits a core's cache
is made float, multiplied and forgotten; for one row the pieces are so small that they never leave
the registers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import Grid, Stored
from pallas_kernels.target import target

MOST_ROWS = 4  # of x; more make up for the weight made whole
TABLE_PIECE = 128  # rows of a table of a step; a vocabulary is padded to a multiple
PIECE = 128  # inputs of a step at most, where blocks are longer
# Inputs of a sum that is written out for one row. More are read from as many places at once, which
# may be more than a cache has room for; of fewer there are more sums to add.
SUM = 16


def are_few(shape: tuple[int, ...]) -> bool:
    """Returns whether inputs of this shape, [batch, seq, ...], are a few rows, and on a CPU.

    Sizes of a program that is exported for any are not known, and many.
    """
    known = all(isinstance(size, int) for size in shape[:2])
    return known and math.prod(shape[:2]) <= MOST_ROWS and target().platform == "cpu"


def piece_of(form: WeightForm, most: int = PIECE) -> int | None:
    """Inputs of a step: a block, or a part of one; None: blocks do not cut the weight evenly.

    They are `most` at most.
    """
    size, block = form.size, form.code.of(form.size)
    if size % block or block % form.code.packed:
        return None
    whole = (n for n in range(min(most, block), 0, -1) if block % n == 0)
    return next((n for n in whole if n % form.code.packed == 0), None)


def few_row_product(
    x: Float[Array, "rows in"], form: WeightForm, stored: Stored
) -> Float[Array, "rows out"]:
    """x . weight in float32, in the faster of two ways; see `piecewise_product`."""
    if len(x) == 1 and form.code.plain and piece_of(form, SUM) > SUM // 2:
        return written_out_product(x, form, stored)
    return piecewise_product(x, form, stored)


def piecewise_product(
    x: Float[Array, "rows in"], form: WeightForm, stored: Stored
) -> Float[Array, "rows out"]:
    """x . weight in float32, some inputs at a time; on one device.

    Args:
      x: a few rows, in any precision.
      form: of the weight, for which `piece_of` gives a number.
      stored: what is kept of it.
    """
    code, piece = form.code, piece_of(form)
    grid = code.grid(stored, 0)
    per_block = code.of(form.size) // piece
    pieces = form.size // piece
    codes = stored["codes"].reshape(pieces, piece // code.packed, -1)
    parts = jnp.swapaxes(x.astype(jnp.float32).reshape(len(x), pieces, piece), 0, 1)
    one = grid.scale.shape[0] == 1  # then the scale is applied once, at the end

    def step(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        part = parts[number]
        apart = part.reshape(len(x), -1, code.packed)
        raws = enumerate(code.in_slots(codes[number]))
        product = sum(apart[:, :, slot] @ raw for slot, raw in raws)
        own = Grid(*(a if a is None else a[number // per_block] for a in grid))
        if own.zero is not None:
            product -= jnp.sum(part, axis=1, keepdims=True) * own.zero
        return total + (product if one else product * own.scale), None

    start = jnp.zeros((len(x), codes.shape[2]), jnp.float32)
    total, _ = jax.lax.scan(step, start, jnp.arange(pieces))
    return total * grid.scale[0] if one else total


def written_out_product(
    x: Float[Array, "1 in"], form: WeightForm, stored: Stored
) -> Float[Array, "1 out"]:
    """x . weight in float32 of one row, as sums over some inputs that are written out.

    Each sum is one loop over the outputs, in which XLA makes numbers of codes and adds their
    products in registers. A `jnp.sum` would be a loop over inputs instead, which it does not
    vectorise. The sums are added by a product with ones, as that is never made part of the loop.

    Args: as `piecewise_product`; the code of the form is `plain`.
    """
    code, piece = form.code, piece_of(form, SUM)
    # XLA would make all weights float before a loop over tokens, as they are the same in all turns.
    stored, x = jax.lax.optimization_barrier((stored, x))
    grid = code.grid(stored, 0)
    count, per_block = form.size // piece, code.of(form.size) // piece
    codes = stored["codes"].reshape(count, piece // code.packed, -1)
    parts = x.astype(jnp.float32).reshape(count, piece)
    total = 0
    for byte in range(codes.shape[1]):
        for slot, raw in enumerate(code.in_slots(codes[:, byte])):
            total += parts[:, byte * code.packed + slot, None] * raw
    wide = Grid(*(a if a is None else jnp.repeat(a, per_block, axis=0) for a in grid))
    if wide.zero is not None:
        total -= jnp.sum(parts, axis=1, keepdims=True) * wide.zero
    return jnp.ones((1, count), jnp.float32) @ (total * wide.scale)


def piecewise_scores(
    x: Float[Array, "rows in"], form: WeightForm, stored: Stored
) -> Float[Array, "rows table"]:
    """x . table^T in float32 of a table of rows, some of these at a time; on one device.

    Args:
      x: a few rows, in any precision.
      form: of the table, whose number of rows `TABLE_PIECE` divides.
      stored: what is kept of it.
    """
    (_, count), x = form.stack[0], x.astype(jnp.float32)
    pieces = {
        name: a.reshape(-1, TABLE_PIECE, *a.shape[1:]) if a.ndim else a
        for name, a in stored.items()
    }

    def step(_: None, number: jax.Array) -> tuple[None, jax.Array]:
        own = {name: a[number] if a.ndim else a for name, a in pieces.items()}
        return None, x @ form.code.decode(own, 1, form.size).T

    _, found = jax.lax.scan(step, None, jnp.arange(count // TABLE_PIECE))
    return jnp.swapaxes(found, 0, 1).reshape(len(x), count)
