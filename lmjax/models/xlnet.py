"""XLNet: tokens predicted in any order, by a second stream that does not see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.config import config, preset, replace
from lmjax.models.attention import Attention, AttentionConfig, Tables
from lmjax.models.batch import Batch
from lmjax.models.cache import Cache, LayerCache
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.initializers import Normal
from lmjax.models.linear import Builder, dropout
from lmjax.models.names import (
    ACTIVATIONS,
    HeadsFirst,
    Matrix,
    Name,
    RowTable,
    Settings,
    VocabularyTable,
    activation_name,
    dense,
    norm,
)
from lmjax.models.norms import LayerNormConfig
from lmjax.models.residual import PostNorm
from lmjax.models.rotary import rotary_frequencies
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.parallel import Layout
from pallas_kernels.attention import Bias, Mask


@config
class TwoStreamAttentionConfig(AttentionConfig):
    """Attention with Transformer-XL's relative positions and XLNet's relative segments.

    Scores depend on the sinusoids of the distance between query and key (Dai et al. 2019,
    arXiv:1901.02860, section 3.3) and on whether both have one token type (Yang et al. 2019,
    arXiv:1906.08237, section 2.5). They are an array over all pairs, like a bias.
    """

    def build(self, builder: Builder) -> TwoStreamAttention:
        """The layer of this config."""
        return TwoStreamAttention(self, builder)

    def tables(self, batch: Batch, lengths: Int[Array, "batch"]) -> Tables:
        """The token types; all alike where a batch has none."""
        types = batch.token_types
        return Tables(jnp.zeros_like(batch.tokens) if types is None else types)


@config
class XLNetConfig(TransformerConfig):
    """A bidirectional stack, and a stream of queries beside it where a batch has ranks."""

    two_streams: ClassVar[bool] = True

    def uses(self, path: Sequence[str], length: int, source: int) -> float:
        """See `TransformerConfig.uses`; both streams are counted."""
        if path[-2:] == ("position", "weight"):
            return 0.0  # multiplied with distances, once for all rows
        shared = path[0] != "blocks" or path[-2] in ("key", "value")
        return TransformerConfig.uses(self, path, length, source) * (1 if shared else 2)

    def pairs(self, length: int, source: int) -> float:
        """See `TransformerConfig.pairs`; with the second stream's, and distances in both.

        A query has a score for each of 2 x length distances, and no value.
        """
        own = TransformerConfig.pairs(self, length, source)
        return own + self.num_layers * (length + 2 * (2 * length) / 2)

    def build(self, layout: Layout, rngs: nnx.Rngs) -> XLNet:
        """See `TransformerConfig.build`."""
        return XLNet(self, layout, rngs)


class TwoStreamAttention(Attention):
    """Attention of one or both streams, which stand one after the other, to the first of them."""

    def __init__(self, config: TwoStreamAttentionConfig, builder: Builder):
        super().__init__(config, builder)
        heads = (("heads", config.num_heads), ("head_dim", config.head_dim))
        self.position = builder.linear((("embed", builder.hidden),), heads, bias=False)
        for name in ("content_bias", "position_bias", "type_bias"):
            setattr(self, name, builder.parameter(heads, "weight", fan_in=config.head_dim))
        types = ((None, 2), *heads)  # of one type, or not
        self.types = builder.parameter(types, "weight", fan_in=config.head_dim)

    def __call__(
        self,
        x: Float[Array, "batch rows embed"],
        mask: Mask,
        tables: Tables,
        cache: LayerCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch rows embed"], None]:
        """Attends to the first stream; see `Attention`. There is no cache."""
        types, x = tables.positions, self.layout.from_stream(x)
        query, content = self.query(x), sequence_slice(self.layout, x, 0, types.shape[1])
        keys, values = self.key(content), self.value(content)
        bias = self.relative(query, types)
        drop = (self.config.dropout, key) if key is not None and self.config.dropout else None
        query = query + self.content_bias[...].astype(query.dtype)
        return self.output(self.attend(query, keys, values, mask, bias, drop)), None

    def relative(
        self, query: Float[Array, "batch rows heads head_dim"], types: Int[Array, "batch seq"]
    ) -> Bias:
        """Contribution of distances and types to the scores."""
        length, streams = types.shape[1], query.shape[1] // types.shape[1]
        layout, wide = self.layout, query.astype(jnp.float32)
        query = layout.reshard(wide, "batch", None, "heads", None)
        weight = layout.reshard(self.position.adapted_weight(), None, "heads", None)
        distances = sinusoids(length - jnp.arange(2 * length), weight.shape[0])
        keys = jnp.einsum("pe,ehd->phd", distances, weight)
        scores = jnp.einsum("bihd,phd->bhip", query + self.position_bias[...], keys)
        # Query i sees key j at distance i - j: row i of all distances begins at length - i.
        scores = self.reshape(scores, streams, 2 * length * length)[..., length:]
        scores = self.reshape(scores, streams, length, 2 * length - 1)[..., :length]
        scores = self.reshape(scores, streams * length, length)
        by_type = jnp.einsum("bihd,thd->bhit", query + self.type_bias[...], self.types[...])
        types = layout.reshard(types, "batch", None)
        same = (types[:, :, None] == types[:, None, :])[:, None]
        same = jnp.concatenate([same] * streams, axis=2)
        scores = scores + jnp.where(same, by_type[..., :1], by_type[..., 1:])
        return scores * self.config.head_dim**-0.5

    def reshape(self, scores: Float[Array, "batch heads *rows"], *rows: int) -> jax.Array:
        """Scores with their axes after the heads, which are whole on each device, cut anew."""
        shape = (*scores.shape[:2], *rows)
        spec = self.layout.spec("batch", "heads", *(None for _ in rows), shape=shape)
        return jax.lax.reshape(scores, shape, out_sharding=spec)


def sinusoids(positions: Int[Array, "positions"], width: int) -> Float[Array, "positions width"]:
    """Sines, then cosines, of each position at wavelengths from 2 pi to 20,000 pi."""
    angles = positions[:, None].astype(jnp.float32) * rotary_frequencies(10_000.0, width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def sequence_slice(layout: Layout, x: jax.Array, first: int, length: int) -> jax.Array:
    """Rows of a sequence, cut over the mesh as whole sequences are."""
    x = layout.reshard(x, "batch", None, None)[:, first : first + length]
    return layout.reshard(x, "batch", "seq", None)


def concat_streams(layout: Layout, first: jax.Array, second: jax.Array) -> jax.Array:
    """Two sequences one after the other, cut over the mesh as one."""
    rest = (None,) * (first.ndim - 2)
    whole = [layout.reshard(a, "batch", None, *rest) for a in (first, second)]
    return layout.reshard(jnp.concatenate(whole, axis=1), "batch", "seq", *rest)


class XLNet(Transformer):
    """Without ranks, what it makes of each token; with them, of each place without its token.

    Ranks are the order of prediction (see `Batch`): the second stream begins with one learned
    vector everywhere and sees the tokens of lower ranks than its own.
    """

    def __init__(self, config: XLNetConfig, layout: Layout, rngs: nnx.Rngs):
        super().__init__(config, layout, rngs)
        sizes = config.hidden, config.num_layers
        how = config.initializer, config.dtype, layout, rngs, config.products
        builder = Builder(*sizes, *how)
        axes = ((None, 1), (None, 1), ("embed", config.hidden))
        self.unknown = builder.parameter(axes, "weight", fan_in=config.hidden)
        if config.word_head:
            rows = config.padded_vocab
            self.head_bias = nnx.Param(
                jnp.zeros(rows, jnp.float32), out_sharding=layout.spec("vocab", shape=(rows,))
            )

    def run(
        self,
        x: Float[Array, "batch seq embed"],
        batch: Batch,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        memory: None = None,
    ) -> tuple[Float[Array, "batch seq embed"], None]:
        """Runs one stream or both; see `Stack.run`."""
        if cache is not None:
            raise ValueError("XLNet reads texts at once: it has no cache")
        if batch.ranks is None:
            return super().run(x, batch, key=key)
        layout, length = self.layout, x.shape[1]
        unknown_key, key = (None, None) if key is None else jax.random.split(key)
        unknown = layout.reshard(self.unknown[...].astype(x.dtype), None, None, None)
        unknown = jnp.zeros_like(x) + unknown
        unknown = dropout(unknown, self.config.dropout, unknown_key)
        mask = Mask(
            causal=True,
            query_segments=concat_streams(layout, batch.segments, batch.segments),
            key_segments=batch.segments,
            query_ranks=concat_streams(layout, batch.ranks, batch.ranks - 1),
            key_ranks=batch.ranks,
        )
        both = concat_streams(layout, x, unknown)
        both, _ = self._run_blocks(both, mask, self.tables(batch), None, key)
        return sequence_slice(layout, both, length, length), None


# layers, hidden, heads
SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16)}


@preset
def xlnet(size: str = "base") -> XLNetConfig:
    """XLNet (Yang et al. 2019, arXiv:1906.08237): base, large; cased vocabulary of 32,000."""
    layers, hidden, heads = size_of(SIZES, size, "xlnet")
    return XLNetConfig(
        vocab_size=32_000,
        hidden=hidden,
        num_layers=layers,
        max_length=None,
        attention=TwoStreamAttentionConfig(
            num_heads=heads,
            head_dim=hidden // heads,
            bias=False,
            output_bias=False,
            causal=False,
            dropout=0.1,
        ),
        feed_forward=FeedForwardConfig(size=4 * hidden, activation="gelu"),
        norm=LayerNormConfig(epsilon=1e-12),
        positions=None,
        arrangement=PostNorm(),
        dropout=0.1,
        initializer=Normal(std=0.02),
    )


def read_xlnet(settings: Settings) -> XLNetConfig:
    """An XLNet's config from its config.json."""
    base, rate = xlnet(), settings["dropout"]
    hidden, heads = settings["d_model"], settings["n_head"]
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["n_layer"],
        attention=replace(
            base.attention,
            num_heads=heads,
            head_dim=settings.get("d_head") or hidden // heads,
            dropout=rate,
        ),
        feed_forward=FeedForwardConfig(
            size=settings["d_inner"],
            activation=ACTIVATIONS[settings["ff_activation"]],
        ),
        norm=replace(base.norm, epsilon=settings["layer_norm_eps"]),
        tied_head=settings["tie_word_embeddings"],
        dropout=rate,
    )


def write_xlnet(config: TransformerConfig) -> dict[str, Any]:
    """An XLNet's config.json; it says no longest length."""
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "d_head": config.attention.head_dim,
        "d_inner": config.feed_forward.size,
        "ff_activation": activation_name(config),
        "layer_norm_eps": config.norm.epsilon,
        "dropout": config.dropout,
        "attn_type": "bi",
        "bi_data": False,
        "clamp_len": -1,
        "untie_r": True,
        "tie_word_embeddings": config.tied_head,
    }


LAYER, OURS = "transformer.layer.{layer}", "blocks.attention"
XLNET_FAMILY = ModelFamily(
    name="xlnet",
    signs=frozenset(("d_model", "d_inner", "ff_activation")),
    model_type="xlnet",
    architecture="XLNetLMHeadModel",
    names=(
        Name("transformer.word_embedding.weight", ("embedding.table",), VocabularyTable()),
        Name("transformer.mask_emb", ("unknown",), RowTable()),
        Name(f"{LAYER}.rel_attn.q", (f"{OURS}.query.weight",), RowTable()),
        Name(f"{LAYER}.rel_attn.k", (f"{OURS}.key.weight",), RowTable()),
        Name(f"{LAYER}.rel_attn.v", (f"{OURS}.value.weight",), RowTable()),
        Name(f"{LAYER}.rel_attn.r", (f"{OURS}.position.weight",), RowTable()),
        Name(f"{LAYER}.rel_attn.o", (f"{OURS}.output.weight",), HeadsFirst()),
        Name(f"{LAYER}.rel_attn.r_w_bias", (f"{OURS}.content_bias",), RowTable()),
        Name(f"{LAYER}.rel_attn.r_r_bias", (f"{OURS}.position_bias",), RowTable()),
        Name(f"{LAYER}.rel_attn.r_s_bias", (f"{OURS}.type_bias",), RowTable()),
        Name(f"{LAYER}.rel_attn.seg_embed", (f"{OURS}.types",), RowTable()),
        *norm(f"{LAYER}.rel_attn.layer_norm", "blocks.attention_norm"),
        *dense(f"{LAYER}.ff.layer_1", "blocks.feed_forward.up", transform=Matrix()),
        *dense(f"{LAYER}.ff.layer_2", "blocks.feed_forward.down", transform=Matrix()),
        *norm(f"{LAYER}.ff.layer_norm", "blocks.feed_forward_norm"),
        Name("lm_loss.weight", ("head.table",), VocabularyTable()),
        Name("lm_loss.bias", ("head_bias",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_loss.weight", "transformer.word_embedding.weight"),
    buffers=(),
    supported={
        "ff_activation": tuple(ACTIVATIONS),
        "attn_type": ("bi",),
        "bi_data": (False,),
        "clamp_len": (-1, 0),
        "is_causal": (True, False),  # which is not obeyed
    },
    read=read_xlnet,
    write=write_xlnet,
    defaults={
        "ff_activation": "gelu",
        "layer_norm_eps": 1e-12,
        "dropout": 0.1,
        "tie_word_embeddings": True,
    },
    aliases={
        "n_token": "vocab_size",
        "hidden_size": "d_model",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
register(XLNET_FAMILY)
