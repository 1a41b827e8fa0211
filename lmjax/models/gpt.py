"""The GPT family: GPT-1, GPT-2 and GPT-3."""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError, preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.gguf_layout import GPT2_GGUF
from lmjax.models.head_classes import GPT_HEADS, SCORE
from lmjax.models.initializers import Normal
from lmjax.models.names import (
    ACTIVATIONS,
    ATTENTION,
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
from lmjax.models.residual import PostNorm
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads
GPT2_SIZES = {
    "124M": (12, 768, 12),
    "355M": (24, 1024, 16),
    "774M": (36, 1280, 20),
    "1.5B": (48, 1600, 25),
}
GPT3_SIZES = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    # The paper prints 24 heads of 128, which is wider than its hidden size.
    "1.3B": (24, 2048, 16),
    "2.7B": (32, 2560, 32),
    "6.7B": (32, 4096, 32),
    # The paper prints 5140; its 40 heads of 128 make 5120.
    "13B": (40, 5120, 40),
    "175B": (96, 12288, 96),
}


def size_of(sizes: dict, size: str, family: str):
    """The row of `sizes`, or a UserError that lists the sizes there are."""
    if size not in sizes:
        raise UserError(f'{family}("{size}"): the sizes are {", ".join(sizes)}')
    return sizes[size]


@preset
def gpt1(size: str = "117M") -> TransformerConfig:
    """GPT-1 (Radford et al. 2018): post-norm blocks; sizes from OpenAI's published train.py."""
    layers, hidden, heads = size_of({"117M": (12, 768, 12)}, size, "gpt1")
    return TransformerConfig(
        vocab_size=40_478,
        hidden=hidden,
        num_layers=layers,
        max_length=512,
        attention=AttentionConfig(num_heads=heads, head_dim=hidden // heads, dropout=0.1),
        feed_forward=FeedForwardConfig(size=4 * hidden),
        positions=LearnedPositions(),
        arrangement=PostNorm(),
        dropout=0.1,
        initializer=Normal(std=0.02),
    )


@preset
def gpt2(size: str = "124M") -> TransformerConfig:
    """GPT-2 (Radford et al. 2019): 124M, 355M, 774M, 1.5B; sizes from OpenAI's model.py."""
    layers, hidden, heads = size_of(GPT2_SIZES, size, "gpt2")
    return TransformerConfig(
        vocab_size=50_257,
        hidden=hidden,
        num_layers=layers,
        max_length=1024,
        attention=AttentionConfig(num_heads=heads, head_dim=hidden // heads),
        feed_forward=FeedForwardConfig(size=4 * hidden),
        initializer=Normal(std=0.02, scale_residual=True, positions_std=0.01),
    )


@preset
def gpt3(size: str = "125M") -> TransformerConfig:
    """GPT-3 (Brown et al. 2020, table 2.1): 125M to 175B, dense and banded layers in turn.

    The paper gives neither the width of the band nor which kind comes first; dense first and 256
    are a choice (GPT-Neo's), and both are settings: `attention.windows`.
    """
    layers, hidden, heads = size_of(GPT3_SIZES, size, "gpt3")
    return TransformerConfig(
        vocab_size=50_257,
        hidden=hidden,
        num_layers=layers,
        max_length=2048,
        attention=AttentionConfig(num_heads=heads, head_dim=hidden // heads, windows=(None, 256)),
        feed_forward=FeedForwardConfig(size=4 * hidden),
        initializer=Normal(std=0.02, scale_residual=True, positions_std=0.01),
    )


CONV1D = Matrix(transposed=False)
BLOCK = "transformer.h.{layer}"
BLOCK_NAMES = (
    *norm(f"{BLOCK}.ln_1", "blocks.attention_norm"),
    *dense(f"{BLOCK}.attn.c_attn", *ATTENTION, transform=CONV1D),
    *dense(
        f"{BLOCK}.attn.c_proj",
        "blocks.attention.output",
        transform=Matrix(inputs=2, transposed=False),
    ),
    *norm(f"{BLOCK}.ln_2", "blocks.feed_forward_norm"),
    *dense(f"{BLOCK}.mlp.c_fc", "blocks.feed_forward.up", transform=CONV1D),
    *dense(f"{BLOCK}.mlp.c_proj", "blocks.feed_forward.down", transform=CONV1D),
)
# The names of GPT-1's config.json, whose "gelu" is the tanh form -> ours.
GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def read_settings(base: TransformerConfig, settings: Settings) -> TransformerConfig:
    """The part of a GPT's config.json that GPT-1 and GPT-2 have in common."""
    hidden, heads = settings["n_embd"], settings["n_head"]
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["n_layer"],
        max_length=settings["n_positions"],
        attention=replace(
            base.attention,
            num_heads=heads,
            head_dim=hidden // heads,
            dropout=settings["attn_pdrop"],
        ),
        feed_forward=replace(base.feed_forward, size=4 * hidden),
        norm=replace(base.norm, epsilon=settings["layer_norm_epsilon"]),
        tied_head=settings["tie_word_embeddings"],
        dropout=settings["resid_pdrop"],
    )


def write_settings(config: TransformerConfig) -> dict[str, Any]:
    """The part of a GPT's config.json that GPT-1 and GPT-2 have in common."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_ctx": config.max_length,
        "n_embd": config.hidden,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "attn_pdrop": config.attention.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied_head,
    }


def read_gpt1(settings: Settings) -> TransformerConfig:
    """A GPT-1's config from its config.json."""
    base = read_settings(gpt1(), settings)
    activation = GPT1_ACTIVATIONS[settings["afn"]]
    return replace(base, feed_forward=replace(base.feed_forward, activation=activation))


def write_gpt1(config: TransformerConfig) -> dict[str, Any]:
    """A GPT-1's config.json; its feed-forward is always four times as wide as the rest."""
    return write_settings(config) | {"afn": activation_name(config, GPT1_ACTIVATIONS)}


def read_gpt2(settings: Settings) -> TransformerConfig:
    """A GPT-2's config from its config.json."""
    base = read_settings(gpt2(), settings)
    return replace(
        base,
        attention=replace(
            base.attention, scale=None if settings["scale_attn_weights"] else UNSCALED
        ),
        feed_forward=replace(
            base.feed_forward,
            size=settings["n_inner"] or base.feed_forward.size,
            activation=ACTIVATIONS[settings["activation_function"]],
        ),
    )


def write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    """A GPT-2's config.json."""
    return write_settings(config) | {
        "activation_function": activation_name(config),
        "n_inner": config.feed_forward.size,
        "scale_attn_weights": config.attention.scale != UNSCALED,
    }


UNSCALED = 1.0  # of scores that are not divided by the root of the width of a head
GPT_DEFAULTS = {
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
GPT_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
GPT1_FAMILY = ModelFamily(
    name="gpt1",
    signs=frozenset(("n_embd", "n_head", "n_layer", "afn")),
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    names=(
        Name("transformer.tokens_embed.weight", ("embedding.table",), VocabularyTable()),
        Name("transformer.positions_embed.weight", ("positions.table",), RowTable()),
        *BLOCK_NAMES,
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.tokens_embed.weight"),
    buffers=(r"(transformer\.)?h\.\d+\.attn\.bias", r"(transformer\.)?position_ids"),
    supported={"afn": tuple(GPT1_ACTIVATIONS), "is_causal": (True, False)},
    heads=(SCORE,),
    read=read_gpt1,
    write=write_gpt1,
    defaults=GPT_DEFAULTS | {"afn": "gelu"},
    aliases=GPT_ALIASES,
)
GPT2_FAMILY = ModelFamily(
    name="gpt2",
    signs=frozenset(("n_embd", "n_head", "n_layer", "n_positions")),
    unlike=frozenset(("dff",)),
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    names=(
        Name("transformer.wte.weight", ("embedding.table",), VocabularyTable()),
        Name("transformer.wpe.weight", ("positions.table",), RowTable()),
        *BLOCK_NAMES,
        *norm("transformer.ln_f", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.wte.weight"),
    buffers=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    supported={
        "activation_function": tuple(ACTIVATIONS),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    gguf=GPT2_GGUF,
    heads=GPT_HEADS,
    read=read_gpt2,
    write=write_gpt2,
    defaults=GPT_DEFAULTS
    | {"activation_function": "gelu_new", "n_inner": None, "scale_attn_weights": True},
    aliases=GPT_ALIASES,
)
register(GPT1_FAMILY, GPT2_FAMILY)
