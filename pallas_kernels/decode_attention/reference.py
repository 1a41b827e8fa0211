"""Decode attention as the formula says it, on gathered keys and values."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.bias import DistanceBias
from pallas_kernels.attention.scores import FORBIDDEN, group_heads
from pallas_kernels.decode_attention.cache import KeyValueCache, gathered
from pallas_kernels.decode_attention.request import DecodeRequest, key_tokens, seen
from pallas_kernels.softcap import softcap_scores
from pallas_kernels.table import Implementation


def reference(
    q: Float[Array, "batch new heads head_dim"],
    cache: KeyValueCache,
    first: Int[Array, "batch"],
    bias: DistanceBias | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Float[Array, "batch new heads value_dim"], Float[Array, "batch new heads"]]:
    """softmax(bend(q k^T scale) + bias) v in float32, and the log-sum-exp of each query."""
    kv_heads = DecodeRequest(q, cache, first, bias, scale, softcap, window).kv_heads
    k, v = (a.astype(jnp.float32) for a in gathered(cache, kv_heads))
    return attend_gathered(
        q.astype(jnp.float32), k, v, cache, first, bias, scale, softcap, window, q.dtype
    )


def attend_gathered(q, k, v, cache, first, bias, scale, softcap, window, dtype):
    """Attention to all slots of gathered rows, products in the dtype of the queries."""
    batch, new, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, new, kv_heads, heads // kv_heads, head_dim)
    grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4))
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    product = {"preferred_element_type": jnp.float32}
    scores = scale * jnp.einsum("bngtd,bnsd->bngts", grouped, k, **product)
    scores, _ = softcap_scores(scores, softcap)
    if bias is not None:
        rows = first[:, None] + jnp.arange(new)
        distance = key_tokens(cache)[:, None, :] - rows[:, :, None]
        by_head = jnp.moveaxis(bias.at(distance), 0, 1)
        scores += group_heads(by_head, kv_heads)
    visible = seen(cache, first, new, window)[:, None, None]
    held = jnp.any(visible, axis=3, keepdims=True)  # NaN where nothing is held must not leak
    v = jnp.where(jnp.swapaxes(held[:, :, 0], 2, 3), v, jnp.zeros_like(v))
    scores = jnp.where(visible, scores, FORBIDDEN)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = jnp.einsum("bngts,bnsd->bngtd", weights.astype(v.dtype), v, **product)
    output = output * jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    output, lse = (jnp.moveaxis(a, 3, 1) for a in (output, lse[..., 0]))
    output = output.reshape(batch, new, heads, -1).astype(dtype)
    return output, lse.reshape(batch, new, heads)


IMPLEMENTATION = Implementation("reference", reference, lambda request: None, returns_lse=True)
