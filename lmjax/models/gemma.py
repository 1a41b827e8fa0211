"""Gemma and Gemma 2: scaled embeddings, norms that multiply by 1 + scale, wide heads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ChatStyle, register
from lmjax.models.feed_forward import GatedFeedForwardConfig
from lmjax.models.gguf_layout import GEMMA2_GGUF, GEMMA_GGUF
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import LLAMA_TOKENS, SCORE
from lmjax.models.initializers import Normal
from lmjax.models.layer_types import read_windows, write_windows
from lmjax.models.llama import (
    LAYER,
    LLAMA_DEFAULTS,
    LLAMA_FAMILY,
    LLAMA_SUPPORTED,
    read_llama,
    write_llama,
)
from lmjax.models.names import ACTIVATIONS, Settings, activation_name, norm
from lmjax.models.norms import RMSNormConfig
from lmjax.models.residual import PreNorm, SandwichNorm
from lmjax.models.rope_settings import ROPE_SUPPORTED
from lmjax.models.rotary import Rotary
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads, key-value heads, feed-forward, head width, divisor of the scores' square
GEMMA2_SIZES = {
    "2B": (26, 2304, 8, 4, 9216, 256, 256),
    "9B": (42, 3584, 16, 8, 14_336, 256, 256),
    "27B": (46, 4608, 32, 16, 36_864, 128, 144),
}


@preset
def gemma2(size: str = "2B") -> TransformerConfig:
    """Gemma 2 (Gemma Team 2024, arXiv:2408.00118, table 1): 2B, 9B, 27B."""
    layers, hidden, heads, kv_heads, mlp, head_dim, scalar = size_of(GEMMA2_SIZES, size, "gemma2")
    return TransformerConfig(
        vocab_size=256_000,
        hidden=hidden,
        num_layers=layers,
        max_length=8192,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            bias=False,
            output_bias=False,
            positions=Rotary(),
            windows=(4096, None),
            scale=scalar**-0.5,
            softcap=50.0,
        ),
        feed_forward=GatedFeedForwardConfig(size=mlp, activation="gelu_tanh"),
        norm=RMSNormConfig(epsilon=1e-6, unit_offset=True),
        positions=None,
        arrangement=SandwichNorm(),
        embedding_scale=math.sqrt(hidden),
        logit_softcap=30.0,
        initializer=Normal(std=0.02),
    )


def read_gemma(settings: Settings) -> TransformerConfig:
    """A Gemma's config from its config.json."""
    # The first public configs say "gelu" and mean the tanh form, and so does transformers.
    activation = settings["hidden_act"]
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    base = read_llama({**settings, "hidden_act": activation, "mlp_bias": False})
    return replace(
        base,
        norm=replace(base.norm, unit_offset=True),
        arrangement=PreNorm(),
        embedding_scale=math.sqrt(settings["hidden_size"]),
    )


def write_gemma(config: TransformerConfig) -> dict[str, Any]:
    """A Gemma's config.json."""
    settings = write_llama(config)
    del settings["mlp_bias"]
    if config.feed_forward.activation == "gelu_tanh":
        settings |= dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
    return settings


def read_gemma2(settings: Settings) -> TransformerConfig:
    """A Gemma 2's config from its config.json; of two activations it goes by hidden_activation."""
    windows = read_windows(settings, alternate(settings["num_hidden_layers"]))
    activation = ACTIVATIONS[settings["hidden_activation"]]
    usual = {"layer_types": None, "hidden_act": "gelu_pytorch_tanh"}
    base = read_gemma({**settings, **usual})
    return replace(
        base,
        attention=replace(
            base.attention,
            windows=windows,
            scale=settings["query_pre_attn_scalar"] ** -0.5,
            softcap=settings["attn_logit_softcapping"],
        ),
        feed_forward=replace(base.feed_forward, activation=activation),
        arrangement=SandwichNorm(),
        logit_softcap=settings["final_logit_softcapping"],
    )


def alternate(layers: int) -> list[str]:
    """The kinds of so many layers in turn, as Gemma 2 has them."""
    return [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]


def write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    """A Gemma 2's config.json."""
    scale = config.attention.scale or config.attention.head_dim**-0.5
    scalar = round(scale**-2, 6)
    settings = {"hidden_activation": activation_name(config)} | write_gemma(config)
    return (
        settings
        | write_windows(config)
        | {
            # transformers 5 takes nothing but whole numbers.
            "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
            "attn_logit_softcapping": config.attention.softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    )


GEMMA_DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
GEMMA_CHAT = ChatStyle(
    "gemma",
    {
        "special": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "start": ("<bos>",),
        "user": ("<start_of_turn>", "user\n{content}", "<end_of_turn>", "\n"),
        "assistant": ("<start_of_turn>", "model\n", "{content}", "<end_of_turn>", "\n"),
        "joined": True,
        "strip": True,
        "stop": ("<end_of_turn>",),
    },
)
GEMMA_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    name="gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    heads=(SCORE, LLAMA_TOKENS),
    supported=LLAMA_SUPPORTED
    | {
        # What versions before 5 go by, and later ones do not.
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
    },
    read=read_gemma,
    write=write_gemma,
    defaults=GEMMA_DEFAULTS,
    chat=(GEMMA_CHAT,),
    gguf=GEMMA_GGUF,
)
GEMMA2_NORMS = {
    "post_attention_layernorm": "blocks.attention_output_norm",
    "pre_feedforward_layernorm": "blocks.feed_forward_norm",
    "post_feedforward_layernorm": "blocks.feed_forward_output_norm",
}
GEMMA2_FAMILY = dataclasses.replace(
    GEMMA_FAMILY,
    name="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    names=(
        *(name for name in LLAMA_FAMILY.names if "post_attention" not in name.theirs),
        *(
            name
            for theirs, ours in GEMMA2_NORMS.items()
            for name in norm(f"{LAYER}.{theirs}", ours)
        ),
    ),
    supported=ROPE_SUPPORTED
    | {
        "hidden_activation": tuple(ACTIVATIONS),
        "use_bidirectional_attention": (False,),
    },
    read=read_gemma2,
    write=write_gemma2,
    gguf=GEMMA2_GGUF,
    defaults={key: value for key, value in GEMMA_DEFAULTS.items() if key != "hidden_act"}
    | {
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
register(GEMMA_FAMILY, GEMMA2_FAMILY)
