"""Decode attention in plain XLA: few queries need no blocks, so all slots are read at once."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.attention.bias import DistanceBias
from pallas_kernels.decode_attention.cache import KeyValueCache, gathered
from pallas_kernels.decode_attention.reference import attend_gathered
from pallas_kernels.decode_attention.request import DecodeRequest
from pallas_kernels.table import Implementation


def chunked(
    q: Float[Array, "batch new heads head_dim"],
    cache: KeyValueCache,
    first: Int[Array, "batch"],
    bias: DistanceBias | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Float[Array, "batch new heads value_dim"], Float[Array, "batch new heads"]]:
    """Attention with products in the dtype of the queries, accumulated in float32."""
    kv_heads = DecodeRequest(q, cache, first, bias, scale, softcap, window).kv_heads
    k, v = (a.astype(q.dtype) for a in gathered(cache, kv_heads))
    return attend_gathered(q, k, v, cache, first, bias, scale, softcap, window, q.dtype)


IMPLEMENTATION = Implementation("chunked", chunked, lambda request: None, returns_lse=True)
