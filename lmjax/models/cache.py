"""The key-value cache: what attention keeps of the tokens so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.models.batch import Batch
from lmjax.parallel import Layout
from pallas_kernels.attention import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """What the layers of a decoder see of an encoder's text.

    Attributes:
      keys, values: as in `Cache`, with a place for each of the encoder's tokens.
      segments: of the encoder's tokens.
    """

    keys: tuple[Float[Array, "_ batch source kv_heads head_dim"], ...]
    values: tuple[Float[Array, "_ batch source kv_heads head_dim"], ...]
    segments: Int[Array, "batch source"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far; rows are padded on the left to a common length.

    A layer with a window keeps no more than it can see, in a ring: what stands at place i of its
    row lies in slot i modulo the window.

    Attributes:
      keys, values: for each layer of a period, of each stretch of layers one after another, the
        stack of its periods.
      segments: 0 where a row is padded or has not come to yet, else 1.
      used: number of columns of `segments` in use.
      lengths: tokens of each row when it was first read.
      source: of the encoder's text, once it is read; None without an encoder.
    """

    keys: tuple[Float[Array, "_ batch _ kv_heads head_dim"], ...]
    values: tuple[Float[Array, "_ batch _ kv_heads head_dim"], ...]
    segments: Int[Array, "batch length"]
    used: Int[Array, ""]
    lengths: Int[Array, "batch"]
    source: Source | None = None

    def is_ring(self, place: int) -> bool:
        """Whether the layers at this place of the pattern keep less than all tokens."""
        return self.keys[place].shape[2] < self.segments.shape[1]

    def expecting(self, batch: Batch) -> Cache:
        """The cache, told the segments of the tokens that come next; their keys are not in yet."""
        lengths = jnp.max(batch.positions, axis=1) + 1
        return dataclasses.replace(
            self,
            lengths=jnp.where(self.used == 0, lengths, self.lengths),
            segments=jax.lax.dynamic_update_slice(self.segments, batch.segments, (0, self.used)),
        )

    def layers(self) -> list[LayerCache]:
        """The parts that the layers extend, for each place of the pattern the first layer's."""
        period = jnp.zeros((), jnp.int32)
        sources = [None] * len(self.keys)
        if self.source is not None:
            sources = list(zip(self.source.keys, self.source.values))
        stacks = enumerate(zip(self.keys, self.values, sources))
        return [
            LayerCache(keys, values, period, self.used, source, self.is_ring(place))
            for place, (keys, values, source) in stacks
        ]

    def extended(self, layers: Sequence[LayerCache], new: int) -> Cache:
        """The cache after its layers have taken `new` tokens."""
        return dataclasses.replace(
            self,
            keys=tuple(layer.keys for layer in layers),
            values=tuple(layer.values for layer in layers),
            used=self.used + new,
        )

    def take(self, layout: Layout, rows: Int[Array, "new"]) -> Cache:
        """A cache of the rows with these numbers; a row may be taken more than once."""

        def taken(a: jax.Array) -> jax.Array:
            if a.ndim == 0:
                return a
            return layout.take(a, rows, axis=1 if a.ndim > 2 else 0)  # after that of the layers

        return jax.tree.map(taken, self)

    def mask(self, mask: Mask, place: int, new: int) -> Mask:
        """`mask` with the keys that `LayerCache.extend` gives to the queries of `new` tokens.

        The segments of the new tokens are those of the cache already; they begin at `used`. Ranks
        are theirs alone: they see all that came before them.
        """
        ranks = mask.key_ranks
        if not self.is_ring(place):
            if ranks is not None:
                ranks = jax.lax.dynamic_update_slice(self._lowest_ranks(), ranks, (0, self.used))
            return dataclasses.replace(
                mask, key_segments=self.segments, key_ranks=ranks, offset=self.used
            )
        slots = self.keys[place].shape[2]
        if new == 1:  # a full ring is the window; which of its slots is which does not matter
            places = self.used - (self.used - jnp.arange(slots)) % slots
            mask = Mask(query_segments=mask.query_segments, key_segments=mask.key_segments)
            ranks = None
        else:
            places = self.used + jnp.arange(-slots, new)
            mask = dataclasses.replace(mask, offset=slots)
            if ranks is not None:
                ranks = jnp.concatenate([self._lowest_ranks()[:, :slots], ranks], axis=1)
        segments = jnp.take(self.segments, jnp.maximum(places, 0), axis=1)
        segments = jnp.where(places < 0, 0, segments)
        return dataclasses.replace(mask, key_segments=segments, key_ranks=ranks)

    def _lowest_ranks(self) -> Int[Array, "batch length"]:
        """Ranks of keys that all new tokens may see."""
        return jnp.full_like(self.segments, jnp.iinfo(jnp.int32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's part of a `Cache`.

    The whole stack is carried through the layers, so that each layer writes in place.
    """

    keys: Float[Array, "periods batch slots kv_heads head_dim"]
    values: Float[Array, "periods batch slots kv_heads head_dim"]
    period: Int[Array, ""]  # which of the stack
    used: Int[Array, ""]
    sources: tuple[jax.Array, jax.Array] | None  # keys and values of `Source`
    ring: bool = dataclasses.field(metadata={"static": True})

    def extend(
        self,
        keys: Float[Array, "batch new kv_heads head_dim"],
        values: Float[Array, "batch new kv_heads head_dim"],
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """Appends new keys and values.

        Returns:
          The keys and values that the new tokens' queries look at (`Cache.mask` says which of them
          they see), in the dtype of the new ones, and the layer's cache with the new ones in it.
        """
        seen_keys, stack_of_keys = self._append(self.keys, keys)
        seen_values, stack_of_values = self._append(self.values, values)
        cache = dataclasses.replace(self, keys=stack_of_keys, values=stack_of_values)
        return seen_keys.astype(keys.dtype), seen_values.astype(values.dtype), cache

    def source(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the encoder's tokens."""
        keys, values = map(self._read, self.sources)
        return keys, values

    def _append(self, stack: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots, count = stack.shape[2], new.shape[1]
        new = new.astype(stack.dtype)
        if self.ring and count > 1:
            oldest_first = jnp.roll(self._read(stack), -self.used, axis=1)
            seen = jnp.concatenate([oldest_first, new], axis=1)
            ring = jnp.roll(seen[:, -slots:], self.used + count, axis=1)
            return seen, self._write(stack, ring, 0)
        stack = self._write(stack, new, self.used % slots if self.ring else self.used)
        return self._read(stack), stack

    def _read(self, stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, self.period, keepdims=False)

    def _write(self, stack: jax.Array, new: jax.Array, slot: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice(stack, new[None], (self.period, 0, slot, 0, 0))
