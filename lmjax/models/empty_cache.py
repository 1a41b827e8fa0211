"""The cache that decoding begins with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmjax.models.batch import Place
from lmjax.models.cache import Cache
from lmjax.models.transformer import TransformerConfig
from lmjax.parallel import Layout


def make_cache(config: TransformerConfig, layout: Layout, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens."""
    attention = config.attention
    # A bias goes by the places of the keys, which a ring does not keep in order.
    ordered = attention.position_rule.biased

    def empty(window: int | None, periods: int) -> jax.Array:
        slots = length if window is None or ordered else min(length, window)
        shape = (periods, batch, slots, attention.kv_heads, attention.head_dim)
        spec = layout.spec(None, "batch", None, "kv_heads", None, shape=shape)
        return jnp.zeros(shape, config.dtype, out_sharding=spec)

    places = [(window, periods) for windows, periods in config.stretches for window in windows]
    keys, values = (tuple(empty(*place) for place in places) for _ in range(2))
    none = jnp.zeros(batch, jnp.int32, out_sharding=layout.spec("batch", shape=(batch,)))
    return Cache(keys, values, none, none, Place(none, none), capacity=length, empty=True)
