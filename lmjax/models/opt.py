"""OPT: GPT-3 retrained and published, from 125M to 175B."""

from __future__ import annotations

from typing import Any

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import ANSWERS, SCORE
from lmjax.models.initializers import Normal
from lmjax.models.names import (
    ACTIVATIONS,
    Matrix,
    Name,
    RowTable,
    Settings,
    VocabularyTable,
    activation_name,
    dense,
    norm,
)
from lmjax.models.positions import LearnedPositions
from lmjax.models.residual import PostNorm, PreNorm
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads
OPT_SIZES = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "1.3B": (24, 2048, 32),
    "2.7B": (32, 2560, 32),
    "6.7B": (32, 4096, 32),
    "13B": (40, 5120, 40),
    "30B": (48, 7168, 56),
    "66B": (64, 9216, 72),
    "175B": (96, 12_288, 96),
}


@preset
def opt(size: str = "125M") -> TransformerConfig:
    """OPT (Zhang et al. 2022, arXiv:2205.01068, table 1): nine sizes from 125M to 175B.

    350M alone is post-norm, has no final norm, and embeds in 512 dimensions.
    """
    layers, hidden, heads = size_of(OPT_SIZES, size, "opt")
    odd = size == "350M"
    return TransformerConfig(
        vocab_size=50_272,
        hidden=hidden,
        num_layers=layers,
        max_length=2048,
        attention=AttentionConfig(num_heads=heads, head_dim=hidden // heads),
        feed_forward=FeedForwardConfig(size=4 * hidden, activation="relu"),
        positions=LearnedPositions(offset=2),
        arrangement=PostNorm() if odd else PreNorm(),
        embedding_size=512 if odd else None,
        dropout=0.1,
        initializer=Normal(std=0.006, scale_residual=True),
    )


def read_opt(settings: Settings) -> TransformerConfig:
    """An OPT's config from its config.json."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    width = settings["word_embed_proj_dim"] or hidden
    pre_norm = settings["do_layer_norm_before"]
    base = opt()
    bias = settings["enable_bias"]
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_hidden_layers"],
        max_length=settings["max_position_embeddings"],
        attention=AttentionConfig(
            num_heads=heads,
            head_dim=hidden // heads,
            bias=bias,
            output_bias=bias,
            dropout=settings["attention_dropout"],
        ),
        feed_forward=FeedForwardConfig(
            size=settings["ffn_dim"],
            activation=ACTIVATIONS[settings["activation_function"]],
            bias=bias,
        ),
        arrangement=PreNorm() if pre_norm else PostNorm(),
        embedding_size=width if width != hidden else None,
        tied_head=settings["tie_word_embeddings"],
        dropout=settings["dropout"],
    )


def write_opt(config: TransformerConfig) -> dict[str, Any]:
    """An OPT's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.hidden,
        "word_embed_proj_dim": config.embedding_size or config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "ffn_dim": config.feed_forward.size,
        "activation_function": activation_name(config),
        "do_layer_norm_before": config.arrangement.final_norm,
        "enable_bias": config.attention.bias,
        "dropout": config.dropout,
        "attention_dropout": config.attention.dropout,
        "tie_word_embeddings": config.tied_head,
    }


LAYER = "model.decoder.layers.{layer}"
OPT_FAMILY = ModelFamily(
    name="opt",
    model_type="opt",
    architecture="OPTForCausalLM",
    names=(
        Name("model.decoder.embed_tokens.weight", ("embedding.table",), VocabularyTable()),
        Name("model.decoder.embed_positions.weight", ("positions.table",), RowTable()),
        *dense("model.decoder.project_in", "project_in", transform=Matrix()),
        *dense("model.decoder.project_out", "project_out", transform=Matrix()),
        *norm(f"{LAYER}.self_attn_layer_norm", "blocks.attention_norm"),
        *dense(f"{LAYER}.self_attn.q_proj", "blocks.attention.query", transform=Matrix()),
        *dense(f"{LAYER}.self_attn.k_proj", "blocks.attention.key", transform=Matrix()),
        *dense(f"{LAYER}.self_attn.v_proj", "blocks.attention.value", transform=Matrix()),
        *dense(
            f"{LAYER}.self_attn.out_proj", "blocks.attention.output", transform=Matrix(inputs=2)
        ),
        *norm(f"{LAYER}.final_layer_norm", "blocks.feed_forward_norm"),
        *dense(f"{LAYER}.fc1", "blocks.feed_forward.up", transform=Matrix()),
        *dense(f"{LAYER}.fc2", "blocks.feed_forward.down", transform=Matrix()),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="model.",
    tied=("lm_head.weight", "model.decoder.embed_tokens.weight"),
    buffers=(),
    supported={
        "activation_function": tuple(ACTIVATIONS),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    heads=(SCORE, ANSWERS),
    read=read_opt,
    write=write_opt,
    defaults={
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "dropout": 0.1,
        "tie_word_embeddings": True,
    },
)
register(OPT_FAMILY)
