"""The key-value cache: what attention keeps of each row's tokens so far."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Real

from lmjax.config import UserError
from lmjax.models.batch import Batch, TokenPosition, last_position
from lmjax.models.cache_arrays import apart, by_row, coded, decoded, gather, joined, put_rows
from lmjax.parallel import Layout
from pallas_kernels.attention import Mask
from pallas_kernels.decode_attention import CacheRows

ARRAYS = "keys", "values", "key_scales", "value_scales"  # of a `Cache`, that layers extend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderCache:
    """Keys and values that the layers of a decoder read of an encoder's text.

    Attributes:
      keys, values: with the periods of a stretch first and a slot for each of the encoder's tokens.
      segments: of the encoder's tokens.
    """

    keys: tuple[Float[Array, "_ batch source kv_heads head_dim"], ...]
    values: tuple[Float[Array, "_ batch source kv_heads head_dim"], ...]
    segments: Int[Array, "batch source"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Incoming:
    """The tokens of one call of the model: where they go in their rows, counted in tokens.

    Attributes:
      first: index of the first column of the batch, which may be padding: then the first token has
        a higher one.
      before: tokens of each row before the call.
      after: tokens of each row after it.
    """

    first: Int[Array, "batch"]
    before: Int[Array, "batch"]
    after: Int[Array, "batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far. Each row has a length of its own.

    Token i of a row lies in slot i of it, whenever and with whatever padding it was read. A layer
    with a window keeps no more than it can see, in a ring: there token i lies in slot i modulo the
    window. So a row holds the same bits whether it began with the others or was put into a free row
    long after them, rows may stop and go on as they like, and a prefilled row is copied as it is.

    One column shared by all rows, each of which would begin where the others stand, would also
    allow that a row is replaced. But then the order of a row's sums, and so the last bits of its
    logits, would depend on the time of its arrival, and no row could wait for others. Nor is it
    faster: on a CPU the scatter of one token a row takes no longer than a slice of one column (24
    arrays of a GPT-2 at batch 8: 58 us against 77 us), whereas selecting with `where` copies the
    whole cache (8.6 ms). It takes longer to compile where layers lie apart: about 30 ms each.

    The caller ends a row before it has more than `capacity` tokens.

    The numbers of a token's heads lie one after another in one axis: see
    `pallas_kernels.decode_attention.cache`, whose kernels read the stacks as they are.

    Attributes:
      keys, values: for each layer of a period, of each stretch of layers one after another, the
        stack of its periods; perhaps in int8 or float8.
      key_scales, value_scales: the numbers that int8 keys and values are multiplied by, one for
        each head of each token, as in `decode_attention`; else None for each layer.
      lengths: tokens that each row holds; 0: the row is free.
      prompt_lengths: tokens of each row's text when it was first read.
      newest: position of the newest token of each row.
      source: of the encoder's text, once it is read; None without an encoder.
      incoming: of the call that is under way; None between calls.
      capacity: most tokens of a row.
      empty: no row has any token, so the tokens of the next call see themselves alone.
    """

    keys: tuple[Real[Array, "_ batch _ kv_size"], ...]
    values: tuple[Real[Array, "_ batch _ kv_size"], ...]
    key_scales: tuple[Float[Array, "_ batch kv_heads _"] | None, ...]
    value_scales: tuple[Float[Array, "_ batch kv_heads _"] | None, ...]
    lengths: Int[Array, "batch"]
    prompt_lengths: Int[Array, "batch"]
    newest: TokenPosition
    source: EncoderCache | None = None
    incoming: Incoming | None = None
    capacity: int = dataclasses.field(kw_only=True, metadata={"static": True})
    empty: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})

    def expecting(self, batch: Batch) -> Cache:
        """The cache with `incoming` of a batch, whose keys are not in yet.

        The tokens of a row stand together, with padding on either side or none.
        """
        real = batch.segments != 0
        count = jnp.sum(real, axis=1, dtype=jnp.int32)
        first = self.lengths - jnp.argmax(real, axis=1).astype(jnp.int32)
        texts = jnp.max(batch.positions, axis=1) + 1
        newest = jax.tree.map(
            lambda new, old: jnp.where(count > 0, new, old), last_position(batch), self.newest
        )
        return dataclasses.replace(
            self,
            prompt_lengths=jnp.where(self.lengths == 0, texts, self.prompt_lengths),
            newest=newest,
            incoming=Incoming(first, self.lengths, self.lengths + count),
        )

    def layers(self) -> list[LayerCache]:
        """The parts that the layers extend, for each place of the pattern the first layer's."""
        period = jnp.zeros((), jnp.int32)
        sources = [None] * len(self.keys)
        if self.source is not None:
            sources = list(zip(self.source.keys, self.source.values))
        return [
            LayerCache(*arrays, period, self.incoming, self.capacity, self.empty)
            for arrays in zip(self.keys, self.values, self.key_scales, self.value_scales, sources)
        ]

    def extended(self, layers: Sequence[LayerCache]) -> Cache:
        """The cache after its layers have taken the incoming tokens."""
        return dataclasses.replace(
            self,
            **{name: tuple(getattr(layer, name) for layer in layers) for name in ARRAYS},
            lengths=self.incoming.after,
            incoming=None,
            empty=False,
        )

    def take(self, layout: Layout, rows: Int[Array, "new"]) -> Cache:
        """A cache of the rows with these numbers; a row may be taken more than once."""
        return jax.tree.map(lambda a: layout.take(a, rows, axis=_batch_axis(a)), self)

    def put(self, slots: Int[Array, "new"], rows: Cache) -> Cache:
        """The cache with rows of another one, which may be shorter, in place of those at `slots`.

        Args:
          slots: numbers of rows, each once.
          rows: what they hold from now on.

        Raises:
          UserError: rows that do not fit.
        """
        _check_fit(self, rows)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            if old.ndim == 4:  # scales have their slots last, which may be fewer
                more = old.shape[3] - new.shape[3]
                new = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, more)))
            return put_rows(old, new, slots, _batch_axis(old))

        names = *ARRAYS, "lengths", "prompt_lengths", "newest"
        found = {
            name: jax.tree.map(put, getattr(self, name), getattr(rows, name)) for name in names
        }
        if self.source is not None:
            ours, theirs = self.source, rows.source
            more = ours.segments.shape[1] - theirs.segments.shape[1]
            found["source"] = EncoderCache(
                jax.tree.map(put, ours.keys, theirs.keys),
                jax.tree.map(put, ours.values, theirs.values),
                # Padding hides what a longer text has left.
                put(ours.segments, jnp.pad(theirs.segments, ((0, 0), (0, more)))),
            )
        return dataclasses.replace(self, **found, empty=False)

    def mask(self, mask: Mask, number: int, new: int) -> Mask:
        """`mask` with the keys that `LayerCache.extend` gives to the queries of `new` tokens.

        Ranks are of the new tokens alone: they see all that came before them.

        Args:
          mask: of the new tokens among themselves, with the layer's window.
          number: of the layer in the pattern.
          new: columns of the batch.
        """
        if self.empty:
            return mask
        slots, incoming = self.keys[number].shape[2], self.incoming
        queries = (mask.query_segments != 0).astype(jnp.int32)
        if new == 1:
            slot = jnp.arange(slots)
            seen = slot < incoming.after[:, None]
            if mask.window is not None and slots == self.capacity:  # else all that a ring holds
                seen &= slot > incoming.before[:, None] - mask.window
            return Mask(query_segments=queries, key_segments=seen.astype(jnp.int32))
        token = incoming.first[:, None] - slots + jnp.arange(slots + new)
        before = incoming.before[:, None]
        held = (token >= jnp.maximum(0, before - slots)) & (token < incoming.after[:, None])
        ranks = mask.key_ranks
        if ranks is not None:
            lowest = jnp.iinfo(jnp.int32).min
            ranks = jnp.pad(ranks, ((0, 0), (slots, 0)))
            ranks = jnp.where(token < before, lowest, ranks)
        return dataclasses.replace(
            mask,
            query_segments=queries,
            key_segments=held.astype(jnp.int32),
            key_ranks=ranks,
            offset=slots,
        )


def _batch_axis(array: jax.Array) -> int:
    """The axis of the rows: keys and values have that of the layers before it."""
    return 1 if array.ndim > 2 else 0


def _check_fit(cache: Cache, rows: Cache) -> None:
    """Raises UserError for rows that a cache cannot take."""
    sizes = [("tokens", cache.capacity, rows.capacity)]
    if (cache.source is None) != (rows.source is None):
        raise UserError(
            "a cache for texts of an encoder and one without: give both or neither `source`"
        )
    if cache.source is not None:
        lengths = (c.source.segments.shape[1] for c in (cache, rows))
        sizes.append(("tokens of the encoder", *lengths))
    for what, most, needed in sizes:
        if needed > most:
            raise UserError(f"rows with room for {needed} {what} do not fit into rows of {most}")


Kept = tuple[jax.Array, jax.Array | None]  # keys or values of a stack, with the scales of int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's part of a `Cache`.

    The whole stack is carried through the layers, so that each layer writes in place.

    Attributes:
      keys, values, key_scales, value_scales: of all layers of the stack.
      sources: keys and values of `EncoderCache`.
      period: number of the layer in the stack.
      incoming, capacity, empty: of `Cache`.
      window: of the layer; None sees all.
      ordered: each token sees itself and those before it, as far as the window reaches.
    """

    paged: ClassVar[bool] = False  # rows of their own; see `PagedLayer`

    keys: Real[Array, "periods batch slots kv_size"]
    values: Real[Array, "periods batch slots kv_size"]
    key_scales: Float[Array, "periods batch kv_heads slots"] | None
    value_scales: Float[Array, "periods batch kv_heads slots"] | None
    sources: tuple[jax.Array, jax.Array] | None
    period: Int[Array, ""]
    incoming: Incoming
    capacity: int = dataclasses.field(metadata={"static": True})
    empty: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    ordered: bool = dataclasses.field(default=False, metadata={"static": True})

    def extend(
        self,
        keys: Float[Array, "batch new kv_heads head_dim"],
        values: Float[Array, "batch new kv_heads head_dim"],
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """Adds new keys and values to their rows.

        Returns:
          The keys and values that the new tokens' queries look at (`Cache.mask` says which of them
          they see), in the dtype of the new ones, and the layer's cache with the new ones in it.
        """
        if keys.shape[1] == 1 and not self.empty:  # the queries see the slots as they lie
            cache = self.written(keys, values)
            seen = [self._read(*own, new) for own, new in zip(cache._stacks, (keys, values))]
        else:
            new = zip(self._stacks, (keys, values))
            found = [self._append_text(*own, given) for own, given in new]
            seen, (keys_kept, values_kept) = zip(*found)
            cache = self._with(keys_kept, values_kept)
        return *(apart(a, new) for a, new in zip(seen, (keys, values))), cache

    def written(
        self,
        keys: Float[Array, "batch new kv_heads head_dim"],
        values: Float[Array, "batch new kv_heads head_dim"],
    ) -> LayerCache:
        """The cache with new keys and values where their rows end."""
        new = zip(self._stacks, (keys, values))
        return self._with(*(self._write(*own, given) for own, given in new))

    @property
    def _stacks(self) -> tuple[Kept, Kept]:
        return (self.keys, self.key_scales), (self.values, self.value_scales)

    def _with(self, keys: Kept, values: Kept) -> LayerCache:
        (keys, key_scales), (values, value_scales) = keys, values
        return dataclasses.replace(
            self, keys=keys, values=values, key_scales=key_scales, value_scales=value_scales
        )

    def rows(self) -> CacheRows:
        """The layer's part of the stacks as decode attention reads it, in place."""
        scales = self.key_scales, self.value_scales
        return CacheRows(self.keys, self.values, self.incoming.after, self.period, *scales)

    def keeps(self, new: int) -> bool:
        """Returns whether the slots hold all that `new` tokens see, once these are written."""
        ring = self.keys.shape[2] < self.capacity
        return not ring or new == 1

    def source(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the encoder's tokens."""
        keys, values = map(self._layer, self.sources)
        return keys, values

    def _write(
        self,
        stack: Real[Array, "periods batch slots kv_size"],
        scales: Float[Array, "periods batch kv_heads slots"] | None,
        new: Float[Array, "batch new kv_heads head_dim"],
    ) -> Kept:
        """Writes new tokens where their rows end."""
        slots, (new, own) = stack.shape[2], coded(new, stack.dtype)

        def write(by_head, stack, new, first, before, after, period):
            count = jnp.arange(new.shape[1])
            token = first[:, None] + count
            slot = token % slots if slots < self.capacity else token
            real = (token >= before[:, None]) & (token < after[:, None])
            slot = jnp.where(real, slot, slots + count)  # outside: padding is dropped
            rows = jnp.arange(stack.shape[1])[:, None]
            at = stack.at[(period, rows, *(slice(None),) * by_head, slot)]
            ordered = new.shape[1] == 1
            return at.set(new, mode="drop", indices_are_sorted=ordered, unique_indices=True)

        incoming = self.incoming
        where = incoming.first, incoming.before, incoming.after, self.period

        def by_rows(stack, new, by_head: bool):
            spec = jax.typeof(stack).sharding.spec
            return by_row(functools.partial(write, by_head), spec, stack, new, *where)

        kept = by_rows(stack, new, False)
        return kept, None if scales is None else by_rows(scales, own, True)

    def _append_text(
        self,
        stack: Real[Array, "periods batch slots kv_size"],
        scales: Float[Array, "periods batch kv_heads slots"] | None,
        given: Float[Array, "batch new kv_heads head_dim"],
    ) -> tuple[Float[Array, "batch seen kv_size"], Kept]:
        """Writes many tokens a row; the queries see the row's last slots, then these tokens.

        What they see is in the order of the text, and query column t is `slots` + t of it: so
        distances are those of the columns in every row.
        """
        slots, new = stack.shape[2], joined(given)
        old = 0 if self.empty else slots
        kept = min(slots, old + new.shape[1])

        def merge(new, first, before, after, *layer):
            if layer:
                column = jnp.arange(old + new.shape[1])
                token = first[:, None] - old + column
                index = jnp.where(token < before[:, None], token % old, column)
                new = gather(jnp.concatenate([*layer, new], axis=1), index)
            last = after[:, None] - 1
            token = last - (last - jnp.arange(kept)) % slots  # the newest that belongs there
            return new, gather(new, token - first[:, None] + old)

        incoming, layer = self.incoming, [] if self.empty else [self._read(stack, scales, given)]
        lengths = incoming.first, incoming.before, incoming.after
        spec = PartitionSpec(*jax.typeof(stack).sharding.spec[1:])
        seen, layer = by_row(merge, (spec, spec), new, *lengths, *layer)
        layer, own = coded(apart(layer, given), stack.dtype)
        start = (self.period, 0, 0, 0)
        stack = jax.lax.dynamic_update_slice(stack, layer[None], start)
        if scales is not None:
            scales = jax.lax.dynamic_update_slice(scales, jnp.swapaxes(own, 1, 2)[None], start)
        return seen, (stack, scales)

    def _read(self, stack, scales, like) -> Float[Array, "batch slots kv_size"]:
        """The layer of a stack, in the dtype of new keys or values."""
        scales = None if scales is None else self._layer(scales)
        return decoded(self._layer(stack), scales, like)

    def _layer(self, stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, self.period, keepdims=False)
