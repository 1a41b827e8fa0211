"""BLOOM: ALiBi instead of positions in the embedding, and a norm after it."""

from __future__ import annotations

from typing import Any

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.gguf_layout import BLOOM_GGUF
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import GPT_HEADS
from lmjax.models.initializers import Normal
from lmjax.models.names import (
    ATTENTION,
    Grouped,
    Matrix,
    Name,
    Settings,
    VocabularyTable,
    dense,
    norm,
)
from lmjax.models.norms import LayerNormConfig
from lmjax.models.positions import ALiBi
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads
BLOOM_SIZES = {
    "560M": (24, 1024, 16),
    "1.1B": (24, 1536, 16),
    "1.7B": (24, 2048, 16),
    "3B": (30, 2560, 32),
    "7.1B": (30, 4096, 32),
    "176B": (70, 14_336, 112),
}


@preset
def bloom(size: str = "560M") -> TransformerConfig:
    """BLOOM (Le Scao et al. 2022, arXiv:2211.05100, table 3): six sizes from 560M to 176B.

    250,680 tokens are used; the published tables have 250,880 rows.
    """
    layers, hidden, heads = size_of(BLOOM_SIZES, size, "bloom")
    return TransformerConfig(
        vocab_size=250_880,
        hidden=hidden,
        num_layers=layers,
        max_length=None,
        attention=AttentionConfig(num_heads=heads, head_dim=hidden // heads, positions=ALiBi()),
        feed_forward=FeedForwardConfig(size=4 * hidden),
        positions=None,
        embedding_norm=LayerNormConfig(),
        initializer=Normal(std=0.0048, scale_residual=True),
    )


def read_bloom(settings: Settings) -> TransformerConfig:
    """A BLOOM's config from its config.json."""
    hidden, heads = settings["hidden_size"], settings["n_head"]
    norm_config = LayerNormConfig(epsilon=settings["layer_norm_epsilon"])
    base = bloom()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["n_layer"],
        attention=replace(
            base.attention,
            num_heads=heads,
            head_dim=hidden // heads,
            dropout=settings["attention_dropout"],
        ),
        feed_forward=FeedForwardConfig(size=4 * hidden),
        norm=norm_config,
        embedding_norm=norm_config,
        dropout=settings["hidden_dropout"],
        tied_head=settings["tie_word_embeddings"],
    )


def write_bloom(config: TransformerConfig) -> dict[str, Any]:
    """A BLOOM's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "layer_norm_epsilon": config.norm.epsilon,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention.dropout,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": config.tied_head,
    }


LAYER = "transformer.h.{layer}"
SUBLAYERS = (
    *dense(
        f"{LAYER}.self_attention.query_key_value",
        *ATTENTION,
        transform=Grouped(),
        bias=Grouped(),
    ),
    *dense(f"{LAYER}.self_attention.dense", "blocks.attention.output", transform=Matrix(inputs=2)),
    *dense(f"{LAYER}.mlp.dense_h_to_4h", "blocks.feed_forward.up", transform=Matrix()),
    *dense(f"{LAYER}.mlp.dense_4h_to_h", "blocks.feed_forward.down", transform=Matrix()),
)
BLOOM_FAMILY = ModelFamily(
    name="bloom",
    model_type="bloom",
    architecture="BloomForCausalLM",
    names=(
        Name("transformer.word_embeddings.weight", ("embedding.table",), VocabularyTable()),
        *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        *norm(f"{LAYER}.input_layernorm", "blocks.attention_norm"),
        *SUBLAYERS,
        *norm(f"{LAYER}.post_attention_layernorm", "blocks.feed_forward_norm"),
        *norm("transformer.ln_f", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.word_embeddings.weight"),
    buffers=(),
    supported={"apply_residual_connection_post_layernorm": (False,)},
    gguf=BLOOM_GGUF,
    heads=GPT_HEADS,
    read=read_bloom,
    write=write_bloom,
    defaults={
        "layer_norm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    },
    aliases={
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
)
register(BLOOM_FAMILY)
