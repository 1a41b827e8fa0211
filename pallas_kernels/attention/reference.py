"""Attention as the formula says it: every score at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pallas_kernels.attention.mask import Mask

# Stands for minus infinity: added to any score it leaves exactly itself, and its exponential is
# exactly zero, without the NaN that two infinities make.
FORBIDDEN = -1e30


def reference(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Float[Array, "..."] | None = None,
    *,
    scale: float,
    dropout: tuple[float, PRNGKeyArray] | None = None,
) -> Float[Array, "batch query heads value_dim"]:
    """softmax(q k^T scale + bias) v in float32 (float64 for float64), then back to q's dtype.

    Scaled dot-product attention of Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    exact = jnp.promote_types(jnp.float32, q.dtype)
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a.astype(exact), groups, axis=2) for a in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(exact), k) * scale
    if bias is not None:
        scores += bias.astype(exact)
    allowed = mask.dense(q.shape[1], k.shape[1])
    weights = jax.nn.softmax(jnp.where(allowed, scores, FORBIDDEN), axis=-1)
    weights = jnp.where(allowed, weights, 0.0)  # of a row that sees nothing the softmax is uniform
    if dropout is not None:
        rate, key = dropout
        kept = jax.random.bernoulli(key, 1.0 - rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - rate), 0.0)
    return jnp.einsum("bhts,bshd->bthd", weights, v).astype(q.dtype)
