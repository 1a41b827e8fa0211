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
LANES = 32  # neighbouring inputs of a term at most
TERMS = 64  # that are written out at most
CHAINS = 4  # sums of terms, so that an addition need not wait for the one before


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
    if len(x) == 1 and (sizes := terms_of(form)) is not None:
        return written_out_product(x, form, stored, *sizes)
    return piecewise_product(x, form, stored)


def terms_of(form: WeightForm) -> tuple[int, int] | None:
    """Inputs of a term, and terms that are written out; None: the weight has no good ones."""
    size, block = form.size, form.code.of(form.size)
    if not form.code.plain or size % block or block % form.code.packed:
        return None
    fitting = (n for n in range(min(LANES, block), 0, -1) if block % n == 0)
    lanes = next(n for n in fitting if n % form.code.packed == 0)
    terms = _largest_divisor(size // lanes, TERMS)
    return (lanes, terms) if lanes > LANES // 4 and lanes * terms >= min(size, 512) else None


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
    x: Float[Array, "1 in"], form: WeightForm, stored: Stored, lanes: int, terms: int
) -> Float[Array, "1 out"]:
    """As `few_row_product` of one row, by sums that are written out.

    y[o] = sum_l sum_t x[t, l] w[o, t, l]: the inner sum is one loop over outputs and lanes, in
    which XLA makes numbers of codes and adds their products in registers, and which reads the codes
    in the order they lie in. A `jnp.sum` would be a loop over t, which it does not vectorise. The
    outer sum is a product with ones, as that is never made part of the loop.
    """
    code, size = form.code, form.size
    # XLA would make all weights float before a loop over tokens, as they are the same in all turns.
    stored, x = jax.lax.optimization_barrier((stored, x))
    grid, each = code.grid(stored, 1), lanes // code.packed
    one = grid.scale.shape[1] == 1  # then the scale is applied once, at the end
    scale, zero = (
        None if a is None else jnp.repeat(a, code.of(size) // lanes, axis=1)[..., None]
        for a in (None if one else grid.scale, grid.zero)
    )
    codes = stored["codes"].reshape(-1, size // lanes, each)
    parts = x.reshape(-1, each, code.packed)

    def segment(first: int | jax.Array) -> jax.Array:
        """Sums of terms from `first` on, [outputs, lanes]."""
        own = [
            None if a is None else jax.lax.dynamic_slice_in_dim(a, first, terms, axis)
            for a, axis in ((codes, 1), (scale, 1), (zero, 1), (parts, 0))
        ]
        totals = [0] * min(CHAINS, terms)
        for term in range(terms):
            n, s, z = (None if a is None else a[:, term] for a in own[:3])
            for slot, raw in enumerate(code.in_slots(n)):
                raw = raw if z is None else raw - z
                raw = raw if s is None else raw * s
                totals[term % CHAINS] += raw * own[3][term, :, slot]
        return sum(totals[1:], totals[0])

    total = segment(0)
    if (count := size // lanes) > terms:
        starts = jnp.arange(terms, count, terms)
        total, _ = jax.lax.scan(lambda a, first: (a + segment(first), None), total, starts)
    y = total @ jnp.ones((each,), jnp.float32)
    return (y * grid.scale[:, 0] if one else y)[None]
