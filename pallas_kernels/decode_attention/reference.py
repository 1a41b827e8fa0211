"""Decode attention as the formula says it, on gathered keys and values."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
    visible = seen(cache, first, new, window)
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, without_unseen(v, visible)))
    product = {"preferred_element_type": jnp.float32}
    scores = scale * jnp.einsum("bngtd,bnsd->bngts", grouped, k, **product)
    weights, top, total = softmax_terms(scores, visible, cache, first, bias, softcap)
    output = jnp.einsum("bngts,bnsd->bngtd", weights.astype(v.dtype), v, **product)
    return normalised(output, top, total, dtype)


def without_unseen(
    v: Float[Array, "batch slots kv_heads value_dim"], visible: Bool[Array, "batch new slots"]
) -> Float[Array, "batch slots kv_heads value_dim"]:
    """Values with zeros in slots that no query sees, whose NaN must not leak through a weight 0."""
    return jnp.where(jnp.any(visible, axis=1)[..., None, None], v, jnp.zeros_like(v))


def softmax_terms(
    scores: Float[Array, "batch kv_heads group new slots"],
    visible: Bool[Array, "batch new slots"],
    cache: KeyValueCache,
    first: Int[Array, "batch"],
    bias: DistanceBias | None,
    softcap: float | None,
) -> tuple[
    Float[Array, "batch kv_heads group new slots"],
    Float[Array, "batch kv_heads group new 1"],
    Float[Array, "batch kv_heads group new 1"],
]:
    """Powers exp(score - largest) of bent scores with their bias, the largest, and their sum."""
    kv_heads, new = scores.shape[1], scores.shape[3]
    scores, _ = softcap_scores(scores, softcap)
    if bias is not None:
        rows = first[:, None] + jnp.arange(new)
        distance = key_tokens(cache)[:, None, :] - rows[:, :, None]
        by_head = jnp.moveaxis(bias.at(distance), 0, 1)
        scores += group_heads(by_head, kv_heads)
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores, FORBIDDEN)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    return weights, top, jnp.sum(weights, axis=-1, keepdims=True)


def normalised(output, top, total, dtype):
    """Output and log-sum-exp of queries [batch, new, heads], zeros where one sees nothing."""
    batch, kv_heads, group, new, _ = output.shape
    output = output * jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    output, lse = (jnp.moveaxis(a, 3, 1) for a in (output, lse[..., 0]))
    output = output.reshape(batch, new, kv_heads * group, -1).astype(dtype)
    return output, lse.reshape(batch, new, kv_heads * group)


IMPLEMENTATION = Implementation("reference", reference, lambda request: None, returns_lse=True)
