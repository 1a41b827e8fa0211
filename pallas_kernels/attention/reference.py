"""Attention as the formula says it: every score at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, DistanceBias
from pallas_kernels.attention.dropout import Dropout, factors
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.scores import FORBIDDEN, group_heads
from pallas_kernels.attention.table import Implementation
from pallas_kernels.softcap import softcap_scores


def reference(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> (
    Float[Array, "batch query heads value_dim"]
    | tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]
):
    """softmax(bend(q k^T scale) + bias) v in float32 (float64 for float64), then back to q's dtype.

    Scaled dot-product attention of Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    exact = jnp.promote_types(jnp.float32, q.dtype)
    batch, query_length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, query_length, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("btngd,bsnd->bngts", grouped.astype(exact), k.astype(exact))
    scores, _ = softcap_scores(scores, softcap)
    if isinstance(bias, DistanceBias):
        bias = bias.dense(mask.offset, query_length, k.shape[1])
    if bias is not None:
        scores += group_heads(bias, kv_heads).astype(exact)
    allowed = mask.dense(query_length, k.shape[1])[:, None]
    scores = jnp.where(allowed, scores, FORBIDDEN)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(allowed, weights, 0.0)  # of a row that sees nothing the softmax is uniform
    if dropout is not None:
        by = factors(dropout.seeds, jnp.arange(k.shape[1]), dropout.rate)
        weights *= by.reshape(weights.shape).astype(exact)
    output = jnp.einsum("bngts,bsnd->btngd", weights, v.astype(exact))
    output = output.reshape(batch, query_length, heads, v.shape[-1]).astype(q.dtype)
    if not return_lse:
        return output
    lse = jnp.where(jnp.any(allowed, axis=-1), jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    return output, jnp.moveaxis(lse, 3, 1).reshape(batch, query_length, heads)


IMPLEMENTATION = Implementation("reference", reference, lambda request: None, returns_lse=True)
