"""Decode attention on a CPU: keys and values are read as they lie, once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.bias import DistanceBias
from pallas_kernels.decode_attention.cache import KeyValueCache, gathered
from pallas_kernels.decode_attention.reference import normalised, softmax_terms, without_unseen
from pallas_kernels.decode_attention.request import DecodeRequest, seen
from pallas_kernels.table import Implementation
from pallas_kernels.target import target


def decode(
    q: Float[Array, "batch one heads head_dim"],
    cache: KeyValueCache,
    first: Int[Array, "batch"],
    bias: DistanceBias | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Float[Array, "batch one heads value_dim"], Float[Array, "batch one heads"]]:
    """Attention of one token a row, in float32.

    A product by heads needs each head's keys side by side, and XLA copies them there at every
    token. Here a query is as wide as all key heads together, with zeros where the keys of other
    heads lie: so many more multiplications, of numbers that are in the processor's caches already.
    """
    kv_heads = DecodeRequest(q, cache, first, bias, scale, softcap, window).kv_heads
    k, v = (a.astype(jnp.float32) for a in gathered(cache, kv_heads))
    batch, slots = k.shape[:2]
    heads, value_dim = q.shape[2], v.shape[-1]
    own = jnp.repeat(jnp.eye(kv_heads), heads // kv_heads, axis=0)[..., None]
    # The keys are the first factor: XLA would copy the second one into another order.
    query = jnp.swapaxes(q.astype(jnp.float32)[:, 0], 1, 2)[:, None]
    wide = (query * jnp.transpose(own, (1, 2, 0))).reshape(batch, -1, heads)
    scores = scale * jnp.einsum("bse,beh->bsh", k.reshape(batch, slots, -1), wide)
    scores = jnp.swapaxes(scores, 1, 2).reshape(batch, kv_heads, -1, 1, slots)
    visible = seen(cache, first, 1, window)
    weights, top, total = softmax_terms(scores, visible, cache, first, bias, softcap)

    def weighted(v: jax.Array) -> Float[Array, "batch heads value_dim"]:
        rows = weights.reshape(batch, heads, slots)
        wide = jnp.einsum("bhs,bse->bhe", rows, v.reshape(batch, slots, -1))
        return jnp.sum(wide.reshape(batch, heads, kv_heads, value_dim) * own, axis=2)

    output = weighted(v)
    # A slot that no query sees has weight 0, but may hold what is no number: then it is left out.
    output = jax.lax.cond(
        jnp.any(jnp.isnan(output)), lambda: weighted(without_unseen(v, visible)), lambda: output
    )
    output = output.reshape(batch, kv_heads, -1, 1, value_dim)
    return normalised(output, top, total, q.dtype)


def refusal(request: DecodeRequest) -> str | None:
    """Reason why it cannot serve, or None if it can."""
    if (platform := target().platform) != "cpu":
        return f"it needs a CPU and the device is a {platform}"
    if (new := request.q.shape[1]) != 1:
        return f"it takes one new token a row, not {new}"
    if len(request.q) == 1:  # a token of GPT-2 takes 1.3 to 1.4 times as long here
        return "it takes several rows: of one, products by heads are faster"
    return None


IMPLEMENTATION = Implementation("cpu", decode, refusal, returns_lse=True)
