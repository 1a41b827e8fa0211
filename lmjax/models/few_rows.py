"""Products of a few rows on CPUs, where reading the weight is the cost.

A weight of floats is read fastest as the first factor, with its outputs first. XLA's products of a
weight of few bits that is made whole first write it to memory and read it again in float32, some 8
times the bytes of what is kept. For one row XLA can make numbers of codes inside the loop of the
product, where they never leave the registers; else a piece of the weight that fits a core's cache
is made float, multiplied and forgotten.
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
MOST_SECOND = 256  # of x as the second factor; of more it is the first
PIECE = 128  # outputs of a step at most
# XLA makes vectors of the loop of one row; that of jax 0.12 does not, and takes 16 times as long.
ONE_LOOP = jax.__version_info__ < (0, 11)


def are_few(shape: tuple[int, ...]) -> bool:
    """Returns whether inputs of this shape, [batch, seq, ...], are a few rows, and on a CPU."""
    return count_on_cpu(shape) <= MOST_ROWS


def count_on_cpu(shape: tuple[int, ...]) -> int | float:
    """Rows of inputs of this shape, [batch, seq, ...]; infinity where the device is no CPU.

    Sizes of a program that is exported for any are not known, and many.
    """
    known = all(isinstance(size, int) for size in shape[:2])
    return math.prod(shape[:2]) if known and target().platform == "cpu" else math.inf


def product_by_outputs(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float[Array, "rows out"]:
    """x . weight^T in float32, on one CPU.

    Of 2 to 16 rows (weight . x^T)^T takes 0.6 to 0.7 times as long as x . weight of a weight that
    has its inputs first, and half as long as x . weight^T, which is the faster way of many rows.
    """
    if len(x) > MOST_SECOND:
        return jnp.matmul(x, weight.T, preferred_element_type=jnp.float32)
    product = jnp.matmul(weight, x.T, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T  # which keeps the order


def few_row_product(
    x: Float[Array, "rows in"], form: WeightForm, stored: Stored
) -> Float[Array, "rows out"]:
    """x . weight in float32, in the way that is fastest; on one device.

    Args:
      x: a few rows, in any precision.
      form: of the weight, or of a table, whose rows are the outputs.
      stored: what is kept of it.
    """
    code, block = form.code, form.code.of(form.size)
    # XLA would make all weights float before a loop over tokens, as they are the same in all turns.
    stored, x = jax.lax.optimization_barrier((stored, x.astype(jnp.float32)))
    if ONE_LOOP and len(x) == 1 and code.packed == 1:
        return _before_a_bias(made_before(x) @ code.decode(stored, 1, form.size).T)
    if len(x) == 1 and code.plain and form.size % block == 0 and block % code.packed == 0:
        return _before_a_bias(packed_product(x, form, stored))
    return piecewise_product(x, form, stored)


def _before_a_bias(product: Float[Array, "1 out"]) -> Float[Array, "1 out"]:
    """The same product, to which XLA adds a bias afterwards.

    It would add it within the product itself, for which it first makes the weight whole and turns
    it around, ten times as slow; not where something else comes before.
    """
    return product * jax.lax.optimization_barrier(jnp.ones(()))


def made_before(x: Float[Array, "1 in"]) -> Float[Array, "1 in"]:
    """The same numbers, made before the loop of a product and not in each of its turns.

    XLA would fuse what makes x into that loop, also through an optimization barrier: a whole norm
    for each weight took longer than the product. It leaves out a division, which it takes to be
    expensive, and cannot simplify this one, as its ones come through a barrier. A small product
    would do as well, but the loops after one often run on a single thread.
    """
    return x / jax.lax.optimization_barrier(jnp.ones_like(x))


def packed_product(
    x: Float[Array, "1 in"], form: WeightForm, stored: Stored
) -> Float[Array, "1 out"]:
    """As `few_row_product` of one row, with codes of which some are a byte and none is cut.

    Neighbours are not brought together: each slot of the bytes has the inputs that belong to it.
    """
    code, grid = form.code, form.code.grid(stored, 1)
    # By a product: XLA would read every other input inside the loop, and not vectorise it.
    inputs = jnp.einsum("qp,ip->qi", jnp.eye(code.packed), x.reshape(-1, code.packed))
    scale, zero = (
        None if a is None else jnp.repeat(a, code.of(form.size) // code.packed, axis=1)
        for a in grid
    )
    raws = zip(code.in_slots(stored["codes"]), inputs, strict=True)
    products = sum((raw if zero is None else raw - zero) * own for raw, own in raws) * scale
    return jnp.ones((1, products.shape[1]), jnp.float32) @ products.T


def piecewise_product(
    x: Float[Array, "rows in"], form: WeightForm, stored: Stored
) -> Float[Array, "rows out"]:
    """As `few_row_product`, some outputs at a time."""
    count = form.matrix_shape[0]
    piece = next(n for n in range(min(count, PIECE), 0, -1) if count % n == 0)
    pieces = {n: a.reshape(-1, piece, *a.shape[1:]) if a.ndim else a for n, a in stored.items()}

    def step(_: None, number: jax.Array) -> tuple[None, jax.Array]:
        own = {name: a[number] if a.ndim else a for name, a in pieces.items()}
        return None, x @ form.code.decode(own, 1, form.size).T

    _, found = jax.lax.scan(step, None, jnp.arange(count // piece))
    return jnp.swapaxes(found, 0, 1).reshape(len(x), count)
