"""Forms of the key-value cache that decode attention reads.

Of every token the numbers of all key heads lie one after another, [.., slots, kv_heads * head_dim],
because that is what a TPU reads best: its memory is tiled over the last two axes, so that the
slots of one head are whole tiles and go to the matrix unit as they lie. With an axis of its own for
the heads after the slots, the keys of one head would be every eighth row of the tiles, which have
to be picked by vector loads and stores. With the heads before the slots, as [heads, slots, d], they
would be whole tiles too, but a page of tokens would lie in as many parts as there are heads, and
heads of 64 numbers would be padded to 128. On a CPU the order of the bytes is that of
[slots, kv_heads, head_dim]. Where kv_heads * head_dim is no multiple of 128, XLA may choose another
layout for what a program is given, and copy it once for the kernel.

Scales of int8 tokens are [.., kv_heads, slots]: there slots are along the lanes, as in the scores.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class CacheRows:
    """A cache that holds each row's tokens in slots of its own.

    Token i of a row is in slot i, or where a row has more tokens than slots, in slot i modulo the
    slots: a ring, which holds the newest tokens.

    Attributes:
        keys: [batch, slots, kv_heads * head_dim], or with the layers as a first axis.
        values: as the keys, of any head size.
        lengths: tokens that each row has, those of the queries included.
        layer: number of the layer, of keys and values with an axis of layers; None without one.
        key_scales, value_scales: [batch, kv_heads, slots], with layers where the keys have them:
            the numbers that int8 keys and values are multiplied by. Both or neither.
    """

    keys: Float[Array, "*layers batch slots kv_size"] | Int8[Array, "*layers batch slots kv_size"]
    values: Float[Array, "*layers batch slots _"] | Int8[Array, "*layers batch slots _"]
    lengths: Int[Array, "batch"]
    layer: Int[Array, ""] | int | None = None
    key_scales: Float[Array, "*layers batch kv_heads slots"] | None = None
    value_scales: Float[Array, "*layers batch kv_heads slots"] | None = None

    @property
    def tokens(self) -> int:
        """Slots of a row."""
        return self.keys.shape[-2]

    def part(self, begin: Int[Array, ""], rows: int) -> CacheRows:
        """The cache of some rows that follow each other."""

        def cut(a: jax.Array | None, axis: int = -3) -> jax.Array | None:
            if a is None:
                return None
            return jax.lax.dynamic_slice_in_dim(a, begin, rows, axis=a.ndim + axis)

        arrays = (cut(a) for a in (self.keys, self.values))
        scales = (cut(a) for a in (self.key_scales, self.value_scales))
        return CacheRows(*arrays, cut(self.lengths, -1), self.layer, *scales)


@pytree
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """A cache of pages, which rows take as they grow (Kwon et al. 2023, arXiv:2309.06180).

    Attributes:
        keys: [pages, page, kv_heads * head_dim]. Of several layers the pages follow each other, and
            the numbers in the table are those of the layer's own.
        values: as the keys, of any head size.
        page_table: numbers of each row's pages in the order of its tokens; entries past a row's
            tokens are not read.
        lengths: tokens that each row has, those of the queries included.
        key_scales, value_scales: [pages, kv_heads, page]: see `CacheRows`.
    """

    keys: Float[Array, "pages page kv_size"] | Int8[Array, "pages page kv_size"]
    values: Float[Array, "pages page _"] | Int8[Array, "pages page _"]
    page_table: Int[Array, "batch row_pages"]
    lengths: Int[Array, "batch"]
    key_scales: Float[Array, "pages kv_heads page"] | None = None
    value_scales: Float[Array, "pages kv_heads page"] | None = None

    @property
    def tokens(self) -> int:
        """Most tokens of a row."""
        return self.page_table.shape[1] * self.keys.shape[1]

    def part(self, begin: Int[Array, ""], rows: int) -> PagedCache:
        """The cache of some rows that follow each other."""
        table, lengths = (
            jax.lax.dynamic_slice_in_dim(a, begin, rows) for a in (self.page_table, self.lengths)
        )
        return dataclasses.replace(self, page_table=table, lengths=lengths)


KeyValueCache = CacheRows | PagedCache


def quantize(
    x: Float[Array, "*rows kv_heads head_dim"],
) -> tuple[Int8[Array, "*rows kv_heads head_dim"], Float[Array, "*rows kv_heads"]]:
    """Rounds each head of each token to int8 times the scale that is returned, in float32.

    The scale is the largest magnitude over 127; of zeros it is 0, of numbers that are not finite a
    NaN.
    """
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(jnp.sum(x, axis=-1))
    scale = jnp.where(finite, jnp.max(jnp.abs(x), axis=-1) / 127, jnp.nan)
    rounded = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return jnp.clip(rounded, -127, 127).astype(jnp.int8), scale


def gathered(cache: KeyValueCache, kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [batch, slots, kv_heads, head_dim] of a cache, int8 ones as float32."""
    names = ("keys", "values", "key_scales", "value_scales")
    arrays = {name: getattr(cache, name) for name in names}
    if isinstance(cache, PagedCache):
        table = jnp.clip(cache.page_table, 0, cache.keys.shape[0] - 1)
        arrays = {name: a if a is None else a[table] for name, a in arrays.items()}
        for name in names[:2]:
            a = arrays[name]
            arrays[name] = a.reshape(a.shape[0], -1, a.shape[-1])
        for name in names[2:]:
            if (a := arrays[name]) is not None:
                arrays[name] = jnp.swapaxes(a, 1, 2).reshape(a.shape[0], kv_heads, -1)
    elif cache.layer is not None:
        arrays = {
            name: a if a is None else jax.lax.dynamic_index_in_dim(a, cache.layer, keepdims=False)
            for name, a in arrays.items()
        }

    def whole(name: str) -> jax.Array:
        a, scales = arrays[name], arrays[f"{name[:-1]}_scales"]
        a = a.reshape(*a.shape[:2], kv_heads, -1)
        if scales is None:
            return a
        return a.astype(jnp.float32) * jnp.swapaxes(scales, 1, 2)[..., None].astype(jnp.float32)

    return whole("keys"), whole("values")
