"""Grouped product by a loop over blocks of rows of one group each, in plain XLA.

Blocks begin where their group does, so that none holds rows of two groups. The last block of a
group reaches into the next one, whose blocks come later and write over what it wrote there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.manual_axes import vary_alike

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 16


def blocks(
    x: Float[Array, "tokens in"],
    w: Float[Array, "groups in out"],
    sizes: Int[Array, "groups"],
    block: int | None = None,
) -> Float[Array, "tokens out"]:
    """x[t] w[group of t], zeros where t is of no group.

    Costs the products of each group's rows, rounded up to a multiple of the block.

    Args:
        block: rows at a time; None is half of the mean group, within bounds.
    """
    if block is None:
        half = -(-x.shape[0] // (2 * w.shape[0]))
        block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 2 ** (half - 1).bit_length()))
    x, w, sizes = vary_alike((x, w, sizes))
    ends = jnp.minimum(jnp.cumsum(sizes), x.shape[0])
    starts = jnp.minimum(ends - sizes, x.shape[0]).clip(0)
    return _blocks(block, x, w, jnp.stack([starts, ends]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(block: int, x, w, bounds):
    return _products(block, x, w, bounds, contracted=0)


def _forward(block, x, w, bounds):
    return _blocks(block, x, w, bounds), (x, w, bounds)


def _backward(block, saved, d_y):
    x, w, bounds = saved
    d_x = _products(block, d_y, w, bounds, contracted=1)
    return d_x.astype(x.dtype), _weights(block, x, d_y, bounds).astype(w.dtype), None


_blocks.defvjp(_forward, _backward)


def _products(block: int, x, w, bounds, contracted: int):
    """Rows of x by their group's matrix, over its axis `contracted`."""
    tokens, width = x.shape[0], w.shape[2 - contracted]
    x = jnp.pad(x, ((0, block), (0, 0)))
    y = vary_alike(jnp.zeros((tokens + block, width), x.dtype), like=(x, w, bounds))

    def group(n, y):
        matrix = w[n]

        def one(state):
            row, y = state
            rows = jax.lax.dynamic_slice_in_dim(x, row, block)
            product = jax.lax.dot_general(
                rows, matrix, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32
            )
            y = jax.lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), row, 0)
            return row + block, y

        return jax.lax.while_loop(lambda state: state[0] < bounds[1, n], one, (bounds[0, n], y))[1]

    y = jax.lax.fori_loop(0, w.shape[0], group, y)[:tokens]
    row = jax.lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    return jnp.where(row < bounds[1, -1], y, jnp.zeros((), y.dtype))


def _weights(block: int, x, d_y, bounds):
    """Of each group the sum over its rows of x^T d_y, in float32."""
    x, d_y = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, d_y))
    zeros = vary_alike(jnp.zeros((x.shape[1], d_y.shape[1]), jnp.float32), like=(x, d_y, bounds))

    def group(bound):
        def one(state):
            row, total = state
            mine = row + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < bound[1]
            left, right = (
                jnp.where(mine, jax.lax.dynamic_slice_in_dim(array, row, block), 0)
                for array in (x, d_y)
            )
            return row + block, total + jnp.einsum(
                "ti,to->io", left, right, preferred_element_type=jnp.float32
            )

        return jax.lax.while_loop(lambda state: state[0] < bound[1], one, (bound[0], zeros))[1]

    return jax.lax.map(group, bounds.T)
