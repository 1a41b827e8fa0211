"""A key-value cache in pages: rows take them as they grow, and several rows may read the same.

Pages are arrays that live as long as the process; which of them a row has, a table says, which
comes with every call (Kwon et al. 2023, arXiv:2309.06180). So a batch may be of any rows, in any
order, and as many as there are at the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from lmjax.models.batch import Batch
from lmjax.models.cache import Cache, Incoming, LayerCache
from lmjax.models.cache_arrays import coded
from pallas_kernels.attention import Mask
from pallas_kernels.decode_attention import PagedCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachePages:
    """The pages of all layers.

    Layers with a window have as many as the others: their tokens lie where the table says too.

    Attributes:
      keys, values: for each layer of a period, of each stretch of layers, as in `Cache`; perhaps
        in int8 or float8.
      key_scales, value_scales: the numbers that int8 keys and values are multiplied by, one for
        each head of each token, as in `decode_attention`; else None for each layer.
    """

    keys: tuple[Real[Array, "_ pages page kv_size"], ...]
    values: tuple[Real[Array, "_ pages page kv_size"], ...]
    key_scales: tuple[Float[Array, "_ pages kv_heads page"] | None, ...]
    value_scales: tuple[Float[Array, "_ pages kv_heads page"] | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedRows:
    """Pages as the cache of some rows, for one call of the model, which takes it as a `Cache`.

    The new tokens of a row begin with the first column of the batch; padding stands behind them.

    Attributes:
      pages: of all rows.
      table: numbers of each row's pages in the order of its tokens. No two rows may have the page
        that one of them writes to.
      lengths: tokens of each row before the call.
      prompt_lengths: as in `Cache`.
      incoming: of the call; None before it.
      empty: no row has any token: the call reads whole texts, whose tokens see what the batch says.
    """

    source: ClassVar[None] = None

    pages: CachePages
    table: Int[Array, "batch row_pages"]
    lengths: Int[Array, "batch"]
    prompt_lengths: Int[Array, "batch"]
    incoming: Incoming | None = None
    empty: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Most tokens of a row."""
        return self.table.shape[1] * self.pages.keys[0].shape[2]

    def expecting(self, batch: Batch) -> PagedRows:
        """See `Cache.expecting`."""
        count = jnp.sum(batch.segments != 0, axis=1, dtype=jnp.int32)
        incoming = Incoming(self.lengths, self.lengths, self.lengths + count)
        return dataclasses.replace(self, incoming=incoming)

    def layers(self) -> list[PagedLayer]:
        """See `Cache.layers`."""
        pages, period = self.pages, jnp.zeros((), jnp.int32)
        return [
            PagedLayer(keys, values, self.table, period, self.incoming, *scales, empty=self.empty)
            for keys, values, *scales in zip(
                pages.keys, pages.values, pages.key_scales, pages.value_scales
            )
        ]

    def extended(self, layers: Sequence[PagedLayer]) -> PagedRows:
        """See `Cache.extended`."""
        names = (field.name for field in dataclasses.fields(CachePages))
        arrays = (tuple(getattr(layer, name) for layer in layers) for name in names)
        after = self.incoming.after
        return dataclasses.replace(self, pages=CachePages(*arrays), lengths=after, incoming=None)

    def mask(self, mask: Mask, number: int, new: int) -> Mask:
        """`mask`: attention reads the pages in place, or sees the batch alone."""
        return mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
    """One layer's part of `PagedRows`; see `LayerCache`, whose place it takes in attention.

    Attributes:
      keys, values: pages of all layers of the stack.
      table, incoming: of `PagedRows`.
      period: number of the layer in the stack.
      key_scales, value_scales: of `CachePages`, of all layers of the stack.
      empty, window, ordered: as in `LayerCache`.
    """

    paged: ClassVar[bool] = True

    keys: Real[Array, "periods pages page kv_size"]
    values: Real[Array, "periods pages page kv_size"]
    table: Int[Array, "batch row_pages"]
    period: Int[Array, ""]
    incoming: Incoming
    key_scales: Float[Array, "periods pages kv_heads page"] | None = None
    value_scales: Float[Array, "periods pages kv_heads page"] | None = None
    empty: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    ordered: bool = dataclasses.field(default=False, metadata={"static": True})

    def extend(
        self,
        keys: Float[Array, "batch new kv_heads head_dim"],
        values: Float[Array, "batch new kv_heads head_dim"],
    ) -> tuple[jax.Array, jax.Array, PagedLayer]:
        """See `LayerCache.extend`; the rows were empty: the new tokens see themselves alone."""
        return keys, values, self.written(keys, values)

    def written(
        self,
        keys: Float[Array, "batch new kv_heads head_dim"],
        values: Float[Array, "batch new kv_heads head_dim"],
    ) -> PagedLayer:
        """The cache with new keys and values where their rows end."""
        pages, page = self.keys.shape[1:3]
        token = self.incoming.first[:, None] + jnp.arange(keys.shape[1])
        index = jnp.minimum(token // page, self.table.shape[1] - 1)
        number = jnp.take_along_axis(self.table, index, axis=1)
        number = jnp.where(token < self.incoming.after[:, None], number, pages)  # outside: dropped

        def write(stack: jax.Array | None, new: jax.Array | None, *heads: slice) -> Any:
            if stack is None:
                return None
            return stack.at[(self.period, number, *heads, token % page)].set(new, mode="drop")

        (keys, key_scales), (values, value_scales) = (
            coded(new, self.keys.dtype) for new in (keys, values)
        )
        return dataclasses.replace(
            self,
            keys=write(self.keys, keys),
            values=write(self.values, values),
            key_scales=write(self.key_scales, key_scales, slice(None)),
            value_scales=write(self.value_scales, value_scales, slice(None)),
        )

    def rows(self) -> PagedCache:
        """The layer's pages as decode attention reads them."""
        pages = self.keys.shape[1]
        arrays = self.keys, self.values, self.key_scales, self.value_scales
        keys, values, *scales = (a if a is None else a.reshape(-1, *a.shape[2:]) for a in arrays)
        table = self.table + self.period * pages
        return PagedCache(keys, values, table, self.incoming.after, *scales)


AnyCache = Cache | PagedRows
AnyLayerCache = LayerCache | PagedLayer
