"""Products of a few rows with a weight of few bits on CPUs, where reading the weight is the cost.

XLA's CPU products of a weight that is made whole first write it to memory and read it again in
float32, some 8 times the bytes of what is kept. Here a piece of the weight that fits a core's cache
is made float, multiplied and forgotten; for one row the numbers never leave the registers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import Stored
from pallas_kernels.target import target

MOST_ROWS = 4  # of x; more make up for the weight made whole
PIECE = 128  # outputs of a step at most
PART = 32  # neighbouring inputs of a block at most that are summed before their scale is applied
PARTS = 64  # that are written out at most
TERMS = 96  # at most where parts have several: of more XLA makes no vectors
CHAINS = 4  # sums of parts, so that an addition need not wait for the one before


def are_few(shape: tuple[int, ...]) -> bool:
    """Returns whether inputs of this shape, [batch, seq, ...], are a few rows, and on a CPU.

    Sizes of a program that is exported for any are not known, and many.
    """
    known = all(isinstance(size, int) for size in shape[:2])
    return known and math.prod(shape[:2]) <= MOST_ROWS and target().platform == "cpu"


def few_row_product(
    x: Float[Array, "rows in"], form: WeightForm, stored: Stored
) -> Float[Array, "rows out"]:
    """x . weight in float32, in the faster of two ways; on one device.

    Args:
      x: a few rows, in any precision.
      form: of the weight, or of a table, whose rows are the outputs.
      stored: what is kept of it.
    """
    x = x.astype(jnp.float32)
    if len(x) == 1 and (sizes := parts_of(form)) is not None:
        return written_out_product(x, form, stored, *sizes)
    return piecewise_product(x, form, stored)


def parts_of(form: WeightForm) -> tuple[int, int] | None:
    """Inputs of a part, and parts that are written out; None: the weight has no good ones."""
    size, block = form.size, form.code.of(form.size)
    if not form.code.plain or size % block or block % form.code.packed:
        return None
    fitting = (n for n in range(min(PART, block), 0, -1) if block % n == 0)
    part = next(n for n in fitting if n % form.code.packed == 0)
    count = _largest_divisor(size // part, PARTS)
    return (part, count) if part > PART // 4 and part * count >= min(size, 512) else None


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def piecewise_product(
    x: Float[Array, "rows in"], form: WeightForm, stored: Stored
) -> Float[Array, "rows out"]:
    """As `few_row_product`, some outputs at a time."""
    count = form.matrix_shape[0]
    piece = _largest_divisor(count, PIECE)
    pieces = {n: a.reshape(-1, piece, *a.shape[1:]) if a.ndim else a for n, a in stored.items()}

    def step(_: None, number: jax.Array) -> tuple[None, jax.Array]:
        own = {name: a[number] if a.ndim else a for name, a in pieces.items()}
        return None, x @ form.code.decode(own, 1, form.size).T

    _, found = jax.lax.scan(step, None, jnp.arange(count // piece))
    return jnp.swapaxes(found, 0, 1).reshape(len(x), count)


def written_out_product(
    x: Float[Array, "1 in"], form: WeightForm, stored: Stored, part: int, count: int
) -> Float[Array, "1 out"]:
    """As `few_row_product` of one row, by sums that are written out.

    y[o] = sum_l sum_p s[o, p] sum_t x[p, t, l] n[o, p, t, l] for parts p, terms t and lanes l. All
    but the outer sum is one loop over outputs and lanes, in which XLA makes numbers of codes and
    adds their products in registers, and which reads the codes in the order they lie in. A
    `jnp.sum` would be a loop over its terms, which it does not vectorise. The outer sum is a
    product with ones, as that is never made part of the loop.

    Args: as `few_row_product`; `part` and `count` are what `parts_of` gives.
    """
    code, size = form.code, form.size
    # XLA would make all weights float before a loop over tokens, as they are the same in all turns.
    stored, x = jax.lax.optimization_barrier((stored, x))
    grid, all_parts = code.grid(stored, 1), size // part
    one = grid.scale.shape[1] == 1  # then the scale is applied once, at the end
    terms = next(n for n in (4, 2, 1) if (part % (8 * n) == 0 and count * n <= TERMS) or n == 1)
    lanes = part // terms // code.packed
    codes = stored["codes"].reshape(-1, all_parts, terms, lanes)
    x = x.reshape(all_parts, terms, lanes, code.packed)
    scale, zero = (
        None if a is None else jnp.repeat(a, code.of(size) // part, axis=1)[..., None]
        for a in (None if one else grid.scale, grid.zero)
    )

    def some(first: int | jax.Array) -> jax.Array:
        """Sums of parts from `first` on, [outputs, lanes]."""
        n, s, z, own = (
            None if a is None else jax.lax.dynamic_slice_in_dim(a, first, count, axis)
            for a, axis in ((codes, 1), (scale, 1), (zero, 1), (x, 0))
        )
        totals = [0] * min(CHAINS, count)
        for number in range(count):
            total = 0
            for term in range(terms):
                for slot, raw in enumerate(code.in_slots(n[:, number, term])):
                    raw = raw if z is None else raw - z[:, number]
                    total += raw * own[number, term, :, slot]
            totals[number % CHAINS] += total if s is None else total * s[:, number]
        return sum(totals[1:], totals[0])

    total = some(0)
    if all_parts > count:
        starts = jnp.arange(count, all_parts, count)
        total, _ = jax.lax.scan(lambda a, first: (a + some(first), None), total, starts)
    y = total @ jnp.ones((lanes,), jnp.float32)
    return (y * grid.scale[:, 0] if one else y)[None]
