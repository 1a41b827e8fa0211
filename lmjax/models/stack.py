"""Blocks, and the stack of them that a Transformer is made of."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.config import replace
from lmjax.models.alternating import BlockPair
from lmjax.models.attention import Tables
from lmjax.models.auxiliary import Auxiliary
from lmjax.models.batch import Batch
from lmjax.models.executor import Blocks, Executor, scan_blocks
from lmjax.models.experts import RoutedRows
from lmjax.models.linear import Builder, dropout
from lmjax.models.lora import add_adapters
from lmjax.models.paged_cache import AnyCache, AnyLayerCache
from lmjax.models.quantization import quantize_block
from lmjax.models.residual import Parallel
from pallas_kernels.attention import Mask


class Block(nnx.Module):
    """Attention and feed-forward, each with its norm."""

    def __init__(self, config: Any, builder: Builder):
        """Draws the parameters of one block.

        Args:
          config: a `TransformerConfig` (whose module imports this one).
          builder: of its parts.
        """
        self.config, self.layout = config, builder.layout
        self.layer_dropout = nnx.data(None)  # a number of the layer's own, where they differ
        self.auxiliary = nnx.data(None)  # takes auxiliary losses and measures, in training
        # The outputs of parallel sublayers are summed over devices together.
        self.together = isinstance(config.arrangement, Parallel) and self.layout.divides_stream
        builder = dataclasses.replace(builder, divides=not self.together)
        self.attention = config.attention.build(builder)
        self.feed_forward = config.feed_forward.build(builder)
        for name in config.arrangement.norms:
            setattr(self, name, config.norm.build(config.hidden))

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        mask: Mask,
        tables: Tables,
        cache: AnyLayerCache | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq embed"], AnyLayerCache | None]:
        """The block's output and the cache with its keys and values."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)

        def attention(x):
            nonlocal cache
            with jax.named_scope("attention"):
                out, cache = self.attention(x, mask, tables, cache, keys[0])
                return dropout(self._divided(out), self.dropout, keys[1])

        def feed_forward(x):
            with jax.named_scope("feed_forward"):
                return dropout(self.feed(x, mask, cache, keys[2]), self.dropout, keys[2])

        arrangement = self.config.arrangement
        if self.together:
            attended, fed = arrangement.branches(x, self.norms, attention, feed_forward)
            return x + self.layout.to_stream(attended + fed), cache
        return arrangement.apply(x, self.norms, attention, feed_forward), cache

    def _divided(self, out: jax.Array) -> jax.Array:
        """The output of a sublayer as the stream is, unless it is summed with another's first."""
        return out if self.together else self.layout.to_stream(out)

    def feed(
        self,
        x: Float[Array, "batch seq embed"],
        mask: Mask,
        cache: AnyLayerCache | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq embed"]:
        """The feed-forward layer's output; one that routes tokens is told which are padding."""
        x = self.layout.from_stream(x)
        if not self.config.feed_forward.reads_rows:
            return self._divided(self.feed_forward(x))
        rows = RoutedRows(mask.query_segments != 0, key, self.auxiliary, whole=cache is not None)
        return self._divided(self.feed_forward(x, rows))

    @property
    def dropout(self) -> float | Float[Array, ""]:
        """Dropout of the sublayers' outputs."""
        return self.config.dropout if self.layer_dropout is None else self.layer_dropout

    @property
    def norms(self) -> dict[str, nnx.Module]:
        """The block's norms by the names that its arrangement gives them."""
        return {name: getattr(self, name) for name in self.config.arrangement.norms}


class Stack(nnx.Module):
    """Blocks, what they learn together, and the norm behind the last of them."""

    block: ClassVar[type] = Block

    def __init__(self, config: Any, builder: Builder):
        """Draws the parameters of all blocks; see `Block`."""
        self.config, self.layout = config, builder.layout
        # Runs the blocks; a training step with a pipeline sets its own.
        self.executor: Executor = scan_blocks
        # How many blocks, from the first on, the training step has no gradients of.
        self.frozen_blocks = 0
        # Auxiliary losses and measures of all layers, which the training step asks for.
        self.auxiliary = nnx.data(None)
        attention = config.attention
        learned = attention.position_rule.build(attention.num_heads, builder)
        self.attention_positions = nnx.data(learned)
        self.blocks = self._make_blocks(builder)
        self.final_norm = nnx.data(None)
        if config.arrangement.final_norm:
            self.final_norm = config.norm.build(config.hidden)

    def give_auxiliary(self, auxiliary: Auxiliary) -> None:
        """Gives the layers what takes their auxiliary losses and measures, in training."""
        self.auxiliary = auxiliary

    def _make_blocks(self, builder: Builder) -> Block | BlockPair:
        """A block or pair whose parameters have a leading axis, the layout's `layers`."""
        count = self.config.num_layers // self.config.group
        (layers,) = builder.layout.spec("layers", shape=(count,))

        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: layers})
        def make(rngs):
            own = dataclasses.replace(builder, rngs=rngs)
            block = self._make_block(own)
            quantize_block(block, self.config.quantization)
            add_adapters(block, self.config.lora, own)
            return block

        blocks = make(builder.rngs)
        if layers is not None:  # which vmap knows nothing of

            def along_layers(a):
                return jax.reshard(a, PartitionSpec(layers, *jax.typeof(a).sharding.spec[1:]))

            nnx.update(blocks, jax.tree.map(along_layers, nnx.state(blocks)))
        return blocks

    def _make_block(self, builder: Builder) -> Block | BlockPair:
        """The blocks of one entry of the stack."""
        other = self.config.alternate_feed_forward
        same = replace(self.config, alternate_feed_forward=None)
        second = self.block(same, builder)
        if other is None:
            return second
        return BlockPair(self.block(replace(same, feed_forward=other), builder), second)

    def tables(self, batch: Batch, cache: AnyCache | None = None) -> Tables:
        """Tables of the positions of a batch for all layers; with a cache, of its next tokens."""
        attention, lengths = self.config.attention, jnp.max(batch.positions, axis=1) + 1
        if cache is not None:
            lengths = cache.prompt_lengths
        bias = attention.position_rule.bias(
            self.attention_positions, attention.num_heads, attention.causal
        )
        one_token = cache is not None and not cache.empty and batch.tokens.shape[1] == 1
        by_distance = bias
        if bias is not None and one_token:  # in each row at an index of its own
            bias = bias.between(cache.incoming.before[:, None], jnp.arange(cache.capacity))
        return attention.tables(batch, lengths)._replace(bias=bias, by_distance=by_distance)

    def run(
        self,
        x: Float[Array, "batch seq embed"],
        batch: Batch,
        cache: AnyCache | None = None,
        key: PRNGKeyArray | None = None,
        memory: Any = None,
    ) -> tuple[Float[Array, "batch seq embed"], AnyCache | None]:
        """Runs embeddings of a batch through the blocks and the norm; see `Transformer`.

        Args:
          x: the embeddings.
          batch: their positions and segments.
          cache: what came before.
          key: for dropout.
          memory: what cross-attention reads, for blocks that have it.
        """
        if cache is not None:
            cache = cache.expecting(batch)
        tables = self.tables(batch, cache)._replace(memory=memory)
        mask = batch.mask(causal=self.config.attention.causal)
        with jax.named_scope("blocks"):
            x, cache = self._run_blocks(x, mask, tables, cache, key)
        return x if self.final_norm is None else self.final_norm(x), cache

    def _run_blocks(self, x, mask, tables, cache, key):
        """Hands the blocks to the executor."""
        x, cache = self._run_on_stream(self.layout.to_stream(x), mask, tables, cache, key)
        return self.layout.from_stream(x), cache

    def _run_on_stream(self, x, mask, tables, cache, key):
        graph, params = nnx.split(self.blocks)
        config = self.config
        keys = None if key is None else jax.random.split(key, config.num_layers)
        rates = None if key is None else self._dropout_rates()
        how = config.windows, config.remat, config.unroll
        blocks = Blocks(graph, params, keys, *how, rates, self.auxiliary, config.group)
        if not self.frozen_blocks:
            return self.executor(blocks, x, mask, tables, cache)
        for part in blocks.cut(self.frozen_blocks):
            x, _ = self.executor(part, x, mask, tables, None)
        return x, None

    def _dropout_rates(self) -> Float[Array, "layers"] | None:
        """Dropout by layer, where it rises (LIMA: Zhou et al. 2023, arXiv:2305.11206)."""
        low, high = self.config.dropout, self.config.top_dropout
        if high is None:
            return None
        return jnp.linspace(low, high, self.config.num_layers)
