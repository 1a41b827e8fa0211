"""The cache that decoding begins with: rows, or pages."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax.models.batch import TokenPosition
from lmjax.models.cache import Cache, EncoderCache
from lmjax.models.number_codes import FLOAT8
from lmjax.models.paged_cache import CachePages
from lmjax.models.transformer import TransformerConfig
from lmjax.parallel import Layout
from pallas_kernels.target import target

TPU_SLOTS = 128  # the decode kernel copies so many slots at once
CacheKind = Literal["int8", "fp8"]  # see `make_pages`
DTYPES = {"int8": jnp.int8, "fp8": FLOAT8}


def make_cache(
    config: TransformerConfig,
    layout: Layout,
    batch: int,
    length: int,
    source: int | None = None,
    rings: bool = True,
    kind: CacheKind | None = None,
) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens.

    Args:
      config: of the model.
      layout: how it is cut over the mesh.
      batch: number of rows.
      length: most tokens of a row; on a TPU it is rounded up to a multiple of TPU_SLOTS.
      source: most tokens of an encoder's text, where rows with one are to be put into the cache;
        None for a cache that the model is called with from the first token on.
      rings: whether a layer with a window keeps no more tokens than it sees.
      kind: see `make_pages`.
    """
    attention = config.attention
    if target().platform == "tpu":
        length = -(-length // TPU_SLOTS) * TPU_SLOTS
    # A bias goes by the indices of the keys, which a ring does not keep in order.
    ordered = attention.position_rule.biased or not rings
    windows = [(window, periods) for windows, periods in config.stretches for window in windows]

    def array(shape: tuple[int, ...], names: tuple[str | None, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=layout.spec(*names, shape=shape))

    def zeros(*sizes: int) -> jax.Array:
        return array(sizes, ("batch", *(None for _ in sizes[1:])), jnp.int32)

    def layers(slots: int, periods: int) -> jax.Array:
        shape = (periods, batch, slots, attention.kv_heads, attention.head_dim)
        return array(shape, (None, "batch", None, "kv_heads", None), config.dtype)

    def slots(window: int | None) -> int:
        return length if window is None or ordered else min(length, window)

    def own(window: int | None, periods: int) -> jax.Array:
        shape = (periods, batch, slots(window), attention.kv_heads)
        spec = layout.spec(None, "batch", None, "kv_heads", shape=shape)
        shape = (*shape[:3], shape[3] * attention.head_dim)
        return jnp.zeros(shape, DTYPES.get(kind, config.dtype), out_sharding=spec)

    def scales(window: int | None, periods: int) -> jax.Array | None:
        if kind != "int8":
            return None
        shape = periods, batch, attention.kv_heads, slots(window)
        return array(shape, (None, "batch", "kv_heads", None), jnp.float32)

    arrays = (tuple(make(*newest) for newest in windows) for make in (own, own, scales, scales))
    text = None
    if source is not None:
        read = (tuple(layers(source, periods) for _, periods in windows) for _ in range(2))
        text = EncoderCache(*read, zeros(batch, source))
    newest = TokenPosition(zeros(batch), zeros(batch))
    return Cache(*arrays, zeros(batch), zeros(batch), newest, text, capacity=length, empty=True)


def make_pages(
    config: TransformerConfig, layout: Layout, pages: int, page: int, kind: CacheKind | None = None
) -> CachePages:
    """Empty pages.

    Args:
      config: of the model.
      layout: how it is cut over the mesh: the heads of a token are divided as in attention.
      pages: their number.
      page: tokens of each.
      kind: of keys and values: int8, with a scale for each head of each token, or fp8, without;
        None: what is computed in.
    """
    attention = config.attention
    heads = attention.kv_heads

    def zeros(periods: int) -> jax.Array:
        spec = layout.spec(None, None, None, "kv_heads", shape=(periods, pages, page, heads))
        shape = periods, pages, page, heads * attention.head_dim
        return jnp.zeros(shape, DTYPES.get(kind, config.dtype), out_sharding=spec)

    def scales(periods: int) -> jax.Array | None:
        if kind != "int8":
            return None
        shape = periods, pages, heads, page
        spec = layout.spec(None, None, "kv_heads", None, shape=shape)
        return jnp.zeros(shape, jnp.float32, out_sharding=spec)

    count = [periods for windows, periods in config.stretches for _ in windows]
    return CachePages(*(tuple(map(make, count)) for make in (zeros, zeros, scales, scales)))
