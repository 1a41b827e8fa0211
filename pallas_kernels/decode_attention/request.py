"""A call of decode attention as its implementations see it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.bias import DistanceBias
from pallas_kernels.decode_attention.cache import CacheRows, KeyValueCache


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
    """A call of `decode_attention`; its attributes are the arguments of every implementation."""

    q: jax.Array
    cache: KeyValueCache
    first: jax.Array
    bias: DistanceBias | None
    scale: float
    softcap: float | None
    window: int | None
    return_lse: bool = True

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        return self.cache.keys.shape[-1] // self.q.shape[-1]

    @property
    def value_dim(self) -> int:
        """Size of a value head."""
        return self.cache.values.shape[-1] // self.kv_heads

    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del named["return_lse"]
        return named


def key_tokens(cache: KeyValueCache) -> Int[Array, "batch slots"]:
    """Index of the token in each slot of each row; negative or past the row's end: none."""
    slot = jnp.arange(cache.tokens)
    if not isinstance(cache, CacheRows):
        return jnp.broadcast_to(slot, (cache.lengths.shape[0], cache.tokens))
    last = cache.lengths[:, None] - 1
    return last - (last - slot) % cache.tokens


def seen(
    cache: KeyValueCache, first: Int[Array, "batch"], new: int, window: int | None
) -> Bool[Array, "batch new slots"]:
    """Slots that each query sees: of its token and those before it, in the window."""
    keys = key_tokens(cache)[:, None, :]
    queries = (first[:, None] + jnp.arange(new))[:, :, None]
    lengths = cache.lengths[:, None, None]
    visible = (keys >= 0) & (keys <= queries) & (queries < lengths)
    if window is not None:
        visible &= keys > queries - window
    return visible
