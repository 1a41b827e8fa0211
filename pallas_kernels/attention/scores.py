"""Shared parts of the implementations in plain XLA."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

# Stands for minus infinity: added to any score it leaves exactly itself, and its exponential is
# exactly zero, without the NaN that two infinities make.
FORBIDDEN = -1e30


def product(formula: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum` of two arrays, accumulated and returned in float32 (float64 for float64)."""
    exact = jnp.promote_types(jnp.float32, a.dtype)
    return jnp.einsum(formula, a, b, preferred_element_type=exact)


def group_heads(
    bias: Float[Array, "batch heads query key"], kv_heads: int
) -> Float[Array, "batch kv_heads groups query key"]:
    """An array with its heads, 1 or all, as key heads times the query heads of each."""
    groups = (1, 1) if bias.shape[1] == 1 else (kv_heads, bias.shape[1] // kv_heads)
    return bias.reshape(bias.shape[0], *groups, *bias.shape[2:])
