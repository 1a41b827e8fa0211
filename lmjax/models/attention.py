"""Multi-head attention with grouped queries, on any mesh, with or without a key-value cache."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.linear import Builder
from lmjax.models.norms import NormConfig
from lmjax.models.paged_cache import AnyLayerCache
from lmjax.models.positions import AttentionPositions
from lmjax.models.ring_attention import ring_attention
from lmjax.parallel import Layout, axis_size
from lmjax.parallel.random import draw_rows
from pallas_kernels.attention import (
    Bias,
    CannotServe,
    DistanceBias,
    Dropout,
    Mask,
    implementations,
)
from pallas_kernels.attention import attention as attention_kernel
from pallas_kernels.decode_attention import decode_attention, preferred
from pallas_kernels.manual_axes import on_each_device
from pallas_kernels.target import target

DECODE_KERNELS = ("cpu", "tpu")  # which read a cache in place


class Tables(NamedTuple):
    """Tables of positions that all attention layers share."""

    positions: Any = None  # of `AttentionPositions.rotate`
    query_scale: Float[Array, "batch seq 1 1"] | None = None
    bias: Bias | None = None  # added to the scores
    by_distance: DistanceBias | None = None  # what `bias` was made of
    memory: Any = None  # what cross-attention reads


@config
class AttentionConfig:
    """Self-attention: heads, their groups, and what tells them about positions."""

    num_heads: int = 12  # query heads
    num_kv_heads: int | None = None  # key and value heads, shared by groups; None: num_heads
    head_dim: int = 64  # width of one head
    bias: bool = True  # biases on query, key and value
    output_bias: bool = True  # bias on the output projection
    causal: bool = True  # see only what came before
    windows: tuple[int | None, ...] = (None,)  # band of each layer of a repeating pattern
    positions: AttentionPositions | None = None  # e.g. Rotary or ALiBi
    query_key_norm: NormConfig | None = None  # of each head's queries and keys (Qwen3)
    scale: float | None = None  # of the scores; none: 1 / sqrt(head_dim)
    softcap: float | None = None  # scores are bent to lie within it, as softcap tanh(s / softcap)
    # Queries at positions i beyond this length are multiplied by log i / log length (LogN, Qwen).
    logn_length: int | None = None
    dropout: float = 0.0  # share of attention probabilities dropped in training
    # name of a kernel (reference, chunked, cudnn, hopper, tpu, or a registered one); none: the best
    implementation: str | None = None

    def validate(self) -> None:
        """Raise UserError for numbers that cannot be meant, and heads that cannot be grouped."""
        for name in ("num_heads", "kv_heads", "head_dim"):
            if (number := getattr(self, name)) < 1:
                raise UserError(f"attention.{name}={number}: must be 1 or more")
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"attention.num_heads={self.num_heads} is no multiple of"
                f" num_kv_heads={self.kv_heads}"
            )
        self.position_rule.check_heads(self.num_heads)
        if not self.windows:
            raise UserError("attention.windows is empty: give (None,) for no window")
        if any(window is not None and window < 1 for window in self.windows):
            raise UserError(f"attention.windows={self.windows}: must be 1 or more, or none")
        if self.softcap is not None and self.softcap <= 0:
            raise UserError(f"attention.softcap={self.softcap}: must be above 0, or none")
        if not 0 <= self.dropout < 1:
            raise UserError(f"attention.dropout={self.dropout}: must be 0 or more, and below 1")
        if self.implementation not in (None, *(known := implementations())):
            raise UserError(
                f"attention.implementation={self.implementation}: must be one of"
                f" {', '.join(known)}, or none; one of your own is known once the module that"
                " registers it is imported"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def position_rule(self) -> AttentionPositions:
        """`positions`, or one that does nothing."""
        return AttentionPositions() if self.positions is None else self.positions

    def build(self, builder: Builder) -> Attention:
        """The layer of this config."""
        return Attention(self, builder)

    def tables(self, batch: Batch, lengths: Int[Array, "batch"]) -> Tables:
        """Tables of positions for all layers; see `AttentionPositions.tables`."""
        scale = None
        if self.logn_length is not None:
            positions = jnp.maximum(batch.positions + 1, self.logn_length).astype(jnp.float32)
            scale = (jnp.log(positions) / math.log(self.logn_length))[..., None, None]
        return Tables(self.position_rule.tables(batch, lengths, self.head_dim), scale)


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(head_dim)) v over heads, then the output projection."""

    def __init__(self, config: AttentionConfig, builder: Builder):
        self.config, self.layout = config, builder.layout
        embed = (("embed", builder.hidden),)
        heads = (("heads", config.num_heads), ("head_dim", config.head_dim))
        kv_heads = (("kv_heads", config.kv_heads), ("head_dim", config.head_dim))
        self.query = builder.linear(embed, heads, bias=config.bias, kind="query")
        self.key = builder.linear(embed, kv_heads, bias=config.bias)
        self.value = builder.linear(embed, kv_heads, bias=config.bias, kind="value")
        self.output = builder.linear(heads, embed, bias=config.output_bias, kind="residual")
        self.query_norm = self.key_norm = nnx.data(None)
        if config.query_key_norm is not None:
            self.query_norm = config.query_key_norm.build(config.head_dim)
            self.key_norm = config.query_key_norm.build(config.head_dim)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        mask: Mask,
        tables: Tables,
        cache: AnyLayerCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], AnyLayerCache | None]:
        """Attends within x, or within the cache after appending x to it.

        Args:
          x: activations.
          mask: who sees whom; with a cache, what `Cache.mask` made of it.
          tables: what `config.tables` prepared for the tokens of x.
          cache: keys and values so far.
          key: for dropout; None drops nothing.

        Returns:
          The attended activations and the extended cache.
        """
        query, keys, values = self.heads(x, tables)
        if cache is not None and self.decodes(query, cache, tables.by_distance):
            cache = cache.written(keys, values)
            return self.output(self.decode(query, cache, tables.by_distance)), cache
        if cache is not None:
            keys, values, cache = cache.extend(keys, values)
        dropout = (self.config.dropout, key) if key is not None and self.config.dropout else None
        attended = self.attend(query, keys, values, mask, tables.bias, dropout)
        return self.output(attended), cache

    def heads(self, x: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [batch, seq, heads, head_dim], their positions in them."""
        shared = whole = self.layout.from_stream(x)
        if not self.layout.axes("kv_heads", self.config.kv_heads):
            # Gradients through keys that devices share are no sums over them: they are cut apart.
            shared = self.layout.from_stream(x)
        query, keys, values = self.query(whole), self.key(shared), self.value(shared)
        if self.query_norm is not None:
            query, keys = self.query_norm(query), self.key_norm(keys)
        query, keys = (self.config.position_rule.rotate(a, tables.positions) for a in (query, keys))
        if tables.query_scale is not None:
            query = query * tables.query_scale.astype(query.dtype)
        return query, keys, values

    def decodes(self, query: jax.Array, cache: AnyLayerCache, bias: DistanceBias | None) -> bool:
        """Returns whether a kernel can read what the new tokens see in the cache, without a copy.

        It cannot where devices that share their key heads would have to read a part of each row.
        """
        if cache.paged:  # there is no other way, but for whole texts
            return not cache.empty
        new, wanted = query.shape[1], self.config.implementation
        if cache.empty or not (cache.ordered or new == 1) or not cache.keeps(new):
            return False
        whole = self.layout.axes("heads") and not self.layout.axes("kv_heads", self.config.kv_heads)
        if whole or self.layout.axes("seq") or wanted not in (None, *DECODE_KERNELS):
            return False
        return preferred(query, cache.rows(), bias, window=cache.window) in DECODE_KERNELS

    def decode(
        self, query: jax.Array, cache: AnyLayerCache, bias: DistanceBias | None
    ) -> Float[Array, "batch new heads value_dim"]:
        """Attends to a cache that holds the new tokens, on each device for its rows and heads."""
        layout, config = self.layout, self.config
        # Pages that are whole on each device, where queries are not, are read there for all heads.
        whole = layout.axes("heads") and not layout.axes("kv_heads", config.kv_heads)
        heads = None if cache.paged and whole else "heads"
        query = layout.reshard(query, "batch", None, heads, None)
        bias = jax.tree.map(lambda a: layout.reshard(a, heads, *(None,) * (a.ndim - 1)), bias)
        kernel = functools.partial(
            decode_attention,
            scale=config.scale,
            softcap=config.softcap,
            window=cache.window,
            implementation=None if cache.paged else config.implementation,
        )
        spec = layout.spec("batch", None, heads, None, shape=query.shape)
        # No gradient goes through it, which the check of the types would be for.
        run = on_each_device(kernel, spec, check_vma=False)
        output = run(query, cache.rows(), cache.incoming.first, bias)
        return output if heads else layout.reshard(output, "batch", None, "heads", None)

    def attend(
        self,
        query: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        mask: Mask,
        bias: Bias | None = None,
        dropout: Any = None,
    ) -> Float[Array, "batch seq heads value_dim"]:
        """Runs the kernel on each device's own rows, heads and queries.

        Where sequences are divided, the layout says how queries see the keys of other devices.

        Raises:
          UserError: the implementation that the config names cannot serve, or none can.
        """
        layout, others = self.layout, (keys, values, mask, bias, dropout)
        if not layout.axes("seq") or layout.context == "gather":
            return self.attend_to_all(layout, query, *others)
        if layout.context == "ring":
            return self.attend_in_a_ring(query, *others)
        by_heads = layout.by_heads()
        query = by_heads.reshard(query, "batch", None, "heads", None)
        mask = mask.mapped(lambda a: layout.reshard(a, "batch", None), lambda a: a)
        output = self.attend_to_all(by_heads, query, keys, values, mask, bias, dropout)
        return layout.reshard(output, "batch", "seq", "heads", None)

    def attend_in_a_ring(
        self, query: jax.Array, keys: jax.Array, values: jax.Array, mask: Mask, bias, dropout
    ) -> Float[Array, "batch seq heads value_dim"]:
        """Attends while keys go around the devices; see `ring_attention`.

        Raises:
          UserError: a bias that is an array over pairs, dropout, or parts with an odd length.
        """
        layout, (axis,) = self.layout, self.layout.axes("seq")
        if dropout is not None:
            raise UserError("context=ring: attention weights have no dropout: use gather")
        if bias is not None and not isinstance(bias, DistanceBias):
            raise UserError("context=ring: the bias is an array over pairs of tokens: use gather")
        if query.shape[1] % (parts := 2 * axis_size(axis)):
            raise UserError(
                f"context=ring: sequences of {query.shape[1]} tokens do not divide into the "
                f"{parts} halves of parts of mesh.context={axis_size(axis)}"
            )
        kernel = functools.partial(self.kernel(), return_lse=True)
        bias = jax.tree.map(lambda a: layout.reshard(a, "heads", *(None,) * (a.ndim - 1)), bias)
        keys, values = (repeat_kv_heads(layout, a, query.shape[2], "seq") for a in (keys, values))
        parts = lambda a: layout.reshard(a, "batch", "seq")  # noqa: E731
        mask, axes = mask.mapped(parts, parts), ("batch", "seq", "heads", None)
        spec = layout.spec(*axes, shape=query.shape)
        run = on_each_device(functools.partial(ring_attention, kernel, axis), spec)
        return run(query, keys, values, mask, bias)

    def kernel(self) -> Callable[..., Any]:
        """Attention with the config's settings."""
        return functools.partial(
            _attention,
            scale=self.config.scale,
            softcap=self.config.softcap,
            implementation=self.config.implementation,
        )

    def attend_to_all(
        self,
        layout: Layout,
        query: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        mask: Mask,
        bias: Bias | None,
        dropout: Any,
    ) -> Float[Array, "batch seq heads value_dim"]:
        """Attends with the keys of whole sequences on every device."""
        kernel = self.kernel()
        if isinstance(bias, DistanceBias):
            bias = jax.tree.map(lambda a: layout.reshard(a, "heads", *(None,) * (a.ndim - 1)), bias)
        elif bias is not None:
            rows, queries = (bias.shape[axis] != 1 for axis in (0, 2))
            axes = "batch" if rows else None, "heads", "seq" if queries else None, None
            bias = layout.reshard(bias, *axes)
        keys, values = (repeat_kv_heads(layout, a, query.shape[2]) for a in (keys, values))
        mask = mask.mapped(lambda a: a, lambda a: layout.reshard(a, "batch", None))  # whole rows
        if dropout is not None:
            dropout = self.draw(layout, query.shape, *dropout)
        spec = layout.spec("batch", "seq", "heads", None, shape=query.shape)
        context = layout.axes("seq")

        def local(query, keys, values, mask, bias, dropout):
            if context:
                first = jax.lax.axis_index(context) * query.shape[1]
                mask = dataclasses.replace(mask, offset=mask.offset + first)
            return kernel(query, keys, values, mask, bias, dropout=dropout)

        # A kernel is inside a `shard_map` on a mesh of one device as well.
        if all(entry is None for entry in spec) and target().platform == "cpu":
            return local(query, keys, values, mask, bias, dropout)
        return on_each_device(local, spec)(query, keys, values, mask, bias, dropout)

    def draw(
        self, layout: Layout, shape: tuple[int, ...], rate: float, key: PRNGKeyArray
    ) -> Dropout:
        """Dropout for queries of a shape: one draw for the whole mesh."""
        batch, length, heads, _ = shape
        rows = batch, heads, length
        spec = layout.spec("batch", "heads", "seq", shape=rows)
        draw = functools.partial(jax.random.bits, key, dtype=jnp.uint32)
        return Dropout(draw_rows(draw, rows, spec), rate)


def _attention(*arrays: Any, **settings: Any) -> Any:
    """Runs the kernel; a refusal is an error in the user's settings."""
    try:
        return attention_kernel(*arrays, **settings)
    except CannotServe as error:
        raise UserError(str(error)) from None


def attended_keys(length: int, window: int | None, causal: bool) -> float:
    """Keys that a query sees, on average over a sequence, by the convention of
    `lmjax.scaling.flops`.

    Args:
      length: of the sequence, in tokens.
      window: band of the attention (see `pallas_kernels.attention.Mask`); None: no band.
      causal: whether later keys are hidden.
    """
    band = length if window is None else min(window, length)
    one_side = band - band * band / (2 * length)
    return one_side if causal else 2 * one_side


def repeat_kv_heads(
    layout: Layout, x: jax.Array, num_heads: int, seq: str | None = None
) -> jax.Array:
    """Keys or values as attention on this mesh needs them: whole rows, heads beside their queries.

    Where the key heads do not divide the tensor axis, each is repeated for its group of queries.
    With `seq`, rows stay divided.
    """
    batch, length, kv_heads, head_dim = x.shape
    if layout.axes("heads", num_heads) and not layout.axes("kv_heads", kv_heads):
        x = layout.reshard(x, "batch", seq, None, None)
        spec = layout.spec("batch", seq, "heads", None, shape=(batch, length, num_heads, head_dim))
        group = jnp.arange(num_heads) // (num_heads // kv_heads)
        return x.at[:, :, group].get(out_sharding=spec)
    return layout.reshard(x, "batch", seq, "kv_heads", None)
