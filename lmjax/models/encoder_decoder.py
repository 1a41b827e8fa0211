"""An encoder and a decoder that looks at it, made of the blocks of decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.config import UserError, config, replace
from lmjax.models.alternating import check_alternate
from lmjax.models.attention import Attention, Tables
from lmjax.models.auxiliary import Auxiliary
from lmjax.models.batch import Batch
from lmjax.models.cache import Cache, EncoderCache, LayerCache
from lmjax.models.linear import Builder, dropout
from lmjax.models.residual import PreNorm
from lmjax.models.stack import Block, Stack
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.parallel import Layout
from pallas_kernels.attention import Mask


@config
class EncoderDecoderConfig(TransformerConfig):
    """A decoder that also looks at a second text, which an encoder reads in both directions.

    All other fields are of both; `num_layers`, `max_length`, the windows and the head are the
    decoder's.
    """

    encoder_layers: int = 12  # blocks of the encoder

    def validate(self) -> None:
        """Raise UserError as any model's, or for an arrangement that has no cross-attention."""
        TransformerConfig.validate(self)
        if self.encoder_layers < 1:
            raise UserError(f"encoder_layers={self.encoder_layers}: must be 1 or more")
        if self.alternate_feed_forward is not None:
            check_alternate(self.alternate_feed_forward, self.encoder_layers, "encoder_layers")
        # `DecoderBlock` writes it out: an arrangement of one's own, based on it, has no say there.
        if type(self.arrangement) is not PreNorm:
            raise UserError(
                f"arrangement={type(self.arrangement).__name__}: the blocks of an encoder and a"
                " decoder are PreNorm"
            )

    @property
    def encoder(self) -> EncoderDecoderConfig:
        """The config of the encoder's blocks."""
        attention = replace(self.attention, causal=False, windows=(None,))
        return replace(self, num_layers=self.encoder_layers, attention=attention)

    @property
    def depth(self) -> int:
        """See `TransformerConfig.depth`."""
        return self.num_layers + self.encoder_layers

    def uses(self, path: Sequence[str], length: int, source: int) -> float:
        """See `TransformerConfig.uses`; the decoder too has weights for the encoder's tokens."""
        of_memory = "cross_attention" in path and path[-2] in ("key", "value")
        if path[0] == "encoder" or of_memory:
            return self.feed_forward.uses(path) * source / length
        return TransformerConfig.uses(self, path, length, source)

    def pairs(self, length: int, source: int) -> float:
        """See `TransformerConfig.pairs`; the encoder's tokens see each other and are seen."""
        own = TransformerConfig.pairs(self, length, source)
        return own + self.num_layers * source + self.encoder_layers * source * source / length

    def build(self, layout: Layout, rngs: nnx.Rngs) -> EncoderDecoder:
        """See `TransformerConfig.build`."""
        return EncoderDecoder(self, layout, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Keys and values of an encoder that cross-attention reads.

    Attributes:
      states: of the encoder; None where a cache holds the keys and values made of them.
      mask: which tokens of the decoder see which of the encoder.
    """

    states: Float[Array, "batch source embed"] | None
    mask: Mask


class CrossAttention(Attention):
    """Attention of the decoder's tokens to the encoder's; it knows no positions."""

    def read(self, states: Float[Array, "batch source embed"]) -> tuple[jax.Array, jax.Array]:
        """Keys and values [batch, source, kv_heads, head_dim] of the encoder's states."""
        keys = self.key(states)
        return keys if self.key_norm is None else self.key_norm(keys), self.value(states)

    def look(
        self,
        x: Float[Array, "batch seq embed"],
        keys: Float[Array, "batch source kv_heads head_dim"],
        values: Float[Array, "batch source kv_heads head_dim"],
        mask: Mask,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq embed"]:
        """Attends to keys and values; see `Attention` for `key`."""
        query = self.query(x)
        if self.query_norm is not None:
            query = self.query_norm(query)
        drop = (self.config.dropout, key) if key is not None and self.config.dropout else None
        return self.output(self.attend(query, keys, values, mask, dropout=drop))


class DecoderBlock(Block):
    """Attention, cross-attention and feed-forward, each behind its norm: PreNorm with a third part.

    No other arrangement says where cross-attention stands; the config refuses them.
    """

    def __init__(self, config: TransformerConfig, builder: Builder):
        super().__init__(config, builder)
        self.cross_attention = CrossAttention(config.attention, builder)
        self.cross_attention_norm = config.norm.build(config.hidden)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        mask: Mask,
        tables: Tables,
        cache: LayerCache | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None]:
        """The block's output and the cache with its keys and values."""
        keys, rate = (None,) * 5 if key is None else jax.random.split(key, 5), self.dropout
        whole, stream = self.layout.from_stream, self.layout.to_stream
        normed = whole(self.attention_norm(x))
        attended, cache = self.attention(normed, mask, tables, cache, keys[0])
        x = x + dropout(stream(attended), rate, keys[1])
        memory = tables.memory
        source = self.cross_attention.read(memory.states) if cache is None else cache.source()
        looked = whole(self.cross_attention_norm(x))
        looked = self.cross_attention.look(looked, *source, memory.mask, keys[2])
        x = x + dropout(stream(looked), rate, keys[3])
        fed = self.feed(self.feed_forward_norm(x), mask, cache, keys[4])
        return x + dropout(fed, rate, keys[4]), cache


class EncoderDecoder(Transformer):
    """A decoder with its head, and beside it an encoder that has the same token table.

    It is called as a `Transformer`; `Batch.encoder` is what the encoder reads. With a cache, the
    encoder runs once, where the batch has one, and later calls find its keys in the cache.
    """

    block = DecoderBlock

    def __init__(self, config: EncoderDecoderConfig, layout: Layout, rngs: nnx.Rngs):
        super().__init__(config, layout, rngs)
        sizes = config.hidden, config.encoder_layers
        how = config.initializer, config.dtype, layout, rngs, config.products
        builder = Builder(*sizes, *how)
        self.encoder = Stack(config.encoder, builder)

    def give_auxiliary(self, auxiliary: Auxiliary) -> None:
        """See `Stack.give_auxiliary`; the decoder's layers come first."""
        layers = self.config.num_layers // self.config.group
        self.auxiliary = jax.tree.map(lambda a: a[:layers], auxiliary)
        self.encoder.auxiliary = jax.tree.map(lambda a: a[layers:], auxiliary)

    def run(
        self,
        x: Float[Array, "batch seq embed"],
        batch: Batch,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        memory: None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """Runs the encoder, then the decoder's blocks; see `Stack.run`."""
        encoder_key, key = (None, None) if key is None else jax.random.split(key)
        states, source = None, None if cache is None else cache.source
        if batch.encoder is not None:
            states = self.encode(batch.encoder, encoder_key)
            if cache is not None:
                source = self.source(states, batch.encoder)
                cache, states = dataclasses.replace(cache, source=source), None
        elif source is None:
            raise ValueError("a model with an encoder needs a batch with one: Batch.encoder")
        segments = batch.encoder.segments if source is None else source.segments
        mask = Mask(query_segments=batch.segments, key_segments=segments)
        return super().run(x, batch, cache, key, Memory(states, mask))

    def encode(
        self, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch source embed"]:
        """Output of the encoder for its batch."""
        embed_key, key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self.embed(batch, embed_key), self.config.dropout, embed_key)
        return self.encoder.run(x, batch, key=key)[0]

    def source(self, states: Float[Array, "batch source embed"], batch: Batch) -> EncoderCache:
        """Keys and values of the encoder's states in every layer of the decoder."""
        graph, params = nnx.split(self.blocks)
        group = self.config.group

        def read(params):
            entry = nnx.merge(graph, params)
            blocks = [entry] if group == 1 else [entry.at(member) for member in range(group)]
            found = zip(*(block.cross_attention.read(states) for block in blocks))
            axes = None, "batch", None, "kv_heads", None
            return tuple(self.layout.reshard(jnp.stack(a), *axes) for a in found)

        keys, values = jax.lax.map(read, params)  # [entries, layers of one, ...]
        layers, first = [], 0
        for stretch in self.config.stretches:  # as in `Cache`
            last, period = first + stretch.layers, len(stretch.windows)
            for layer in range(first, first + period):
                entry, member = divmod(layer, group)
                layers.append((slice(entry, last // group, period // group), member))
            first = last
        keys, values = (tuple(a[part] for part in layers) for a in (keys, values))
        return EncoderCache(keys, values, batch.segments)
