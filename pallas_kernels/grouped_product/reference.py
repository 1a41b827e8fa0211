"""Grouped product as the formula says it: every row by every group's matrix, and one is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference(
    x: Float[Array, "tokens in"], w: Float[Array, "groups in out"], sizes: Int[Array, "groups"]
) -> Float[Array, "tokens out"]:
    """x[t] w[group of t], zeros where t is of no group; every group's product with all rows."""
    row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    ends = jnp.cumsum(sizes)
    total = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    for group in range(w.shape[0]):
        product = jnp.einsum("ti,io->to", x, w[group], preferred_element_type=jnp.float32)
        mine = (row >= ends[group] - sizes[group]) & (row < ends[group])
        total = jnp.where(mine, product, total)
    return total.astype(x.dtype)
