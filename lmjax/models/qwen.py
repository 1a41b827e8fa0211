"""Qwen, Qwen2 and Qwen3: LLaMA's block; biases on queries, keys and values, or norms of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmjax.config import preset, replace
from lmjax.models.family import ChatStyle, ModelFamily, register
from lmjax.models.feed_forward import GatedFeedForwardConfig
from lmjax.models.gguf_layout import QWEN2_GGUF, QWEN3_GGUF
from lmjax.models.gpt import BLOCK, size_of
from lmjax.models.initializers import Normal
from lmjax.models.layer_types import read_windows, write_windows
from lmjax.models.llama import (
    LAYER,
    LLAMA_DEFAULTS,
    LLAMA_FAMILY,
    llama,
    read_llama,
    write_llama,
)
from lmjax.models.names import (
    ATTENTION,
    Matrix,
    Name,
    Settings,
    VocabularyTable,
    dense,
    norm,
)
from lmjax.models.norms import RMSNormConfig
from lmjax.models.rotary import DynamicNTKScaling, Rotary
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads, feed-forward, vocabulary, length of training, rotary base
QWEN_SIZES = {
    "1.8B": (24, 2048, 16, 5504, 151_936, 8192, 10_000.0),
    "7B": (32, 4096, 32, 11_008, 151_936, 8192, 10_000.0),
    "14B": (40, 5120, 40, 13_696, 152_064, 2048, 10_000.0),
    "72B": (80, 8192, 64, 24_576, 152_064, 32_768, 1_000_000.0),
}


@preset
def qwen(size: str = "7B") -> TransformerConfig:
    """Qwen (Bai et al. 2023, arXiv:2309.16609): 1.8B, 7B, 14B, 72B.

    Dynamic NTK and LogN act beyond the length of training; 72B, trained at 32K, has neither. The
    report's windows (section 2.3.2) have no published sizes: `attention.windows` sets them.
    """
    layers, hidden, heads, mlp, vocabulary, length, base = size_of(QWEN_SIZES, size, "qwen")
    stretched = size != "72B"
    return replace(
        llama(),
        vocab_size=vocabulary,
        hidden=hidden,
        num_layers=layers,
        max_length=32_768,
        attention=replace(
            llama().attention,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            bias=True,
            positions=Rotary(
                base=base, scaling=DynamicNTKScaling(length=length) if stretched else None
            ),
            logn_length=length if stretched else None,
        ),
        feed_forward=GatedFeedForwardConfig(size=mlp),
        initializer=Normal(std=0.02, scale_residual=True),
    )


def read_qwen(settings: Settings) -> TransformerConfig:
    """A Qwen's config from its config.json, whose intermediate_size is twice the width."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    length = settings.get("seq_length", 2048)
    scaling = DynamicNTKScaling(length=length) if settings.get("use_dynamic_ntk") else None
    base = qwen()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_hidden_layers"],
        max_length=settings.get("max_position_embeddings", length),
        attention=replace(
            base.attention,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=settings.get("kv_channels") or hidden // heads,
            positions=Rotary(base=float(settings.get("rotary_emb_base", 10_000)), scaling=scaling),
            logn_length=length if settings.get("use_logn_attn") else None,
            dropout=settings.get("attn_dropout_prob", 0.0),
        ),
        feed_forward=GatedFeedForwardConfig(size=settings["intermediate_size"] // 2),
        norm=RMSNormConfig(epsilon=settings.get("layer_norm_epsilon", 1e-6)),
        dropout=settings.get("emb_dropout_prob", 0.0),
        tied_head=settings.get("tie_word_embeddings", False),
    )


def write_qwen(config: TransformerConfig) -> dict[str, Any]:
    """A Qwen's config.json."""
    attention = config.attention
    scaling = getattr(attention.positions, "scaling", None)
    dynamic = isinstance(scaling, DynamicNTKScaling)
    length = scaling.length if dynamic else attention.logn_length
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "kv_channels": attention.head_dim,
        "max_position_embeddings": config.max_length,
        "seq_length": length or config.max_length,
        "use_dynamic_ntk": dynamic,
        "use_logn_attn": attention.logn_length is not None,
        "rotary_emb_base": getattr(attention.positions, "base", 10_000.0),
        "rotary_pct": 1.0,
        "intermediate_size": 2 * config.feed_forward.size,
        "no_bias": True,
        "scale_attn_weights": True,
        "layer_norm_epsilon": config.norm.epsilon,
        "attn_dropout_prob": attention.dropout,
        "emb_dropout_prob": config.dropout,
        "tie_word_embeddings": config.tied_head,
    }


CHATML_CHAT = ChatStyle(
    "chatml",
    {
        "special": ("<|im_start|>", "<|im_end|>"),
        "system": ("<|im_start|>", "system", "\n", "{content}", "<|im_end|>", "\n"),
        "user": ("<|im_start|>", "user", "\n", "{content}", "<|im_end|>", "\n"),
        "assistant": ("<|im_start|>", "assistant", "\n", "{content}", "<|im_end|>", "\n"),
        "default_system": "You are a helpful assistant.",
        "stop": ("<|im_end|>", "<|im_start|>"),
    },
)
QWEN_FAMILY = ModelFamily(
    name="qwen",
    model_type="qwen",
    architecture="QWenLMHeadModel",
    names=(
        Name("transformer.wte.weight", ("embedding.table",), VocabularyTable()),
        *norm(f"{BLOCK}.ln_1", "blocks.attention_norm"),
        *dense(f"{BLOCK}.attn.c_attn", *ATTENTION, transform=Matrix()),
        *dense(f"{BLOCK}.attn.c_proj", "blocks.attention.output", transform=Matrix(inputs=2)),
        *norm(f"{BLOCK}.ln_2", "blocks.feed_forward_norm"),
        *dense(f"{BLOCK}.mlp.w1", "blocks.feed_forward.up", transform=Matrix()),
        *dense(f"{BLOCK}.mlp.w2", "blocks.feed_forward.gate", transform=Matrix()),
        *dense(f"{BLOCK}.mlp.c_proj", "blocks.feed_forward.down", transform=Matrix()),
        *norm("transformer.ln_f", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.wte.weight"),
    buffers=(r".*rotary_emb\.inv_freq",),
    supported={
        "no_bias": (True,),
        "rotary_pct": (1.0,),
        "scale_attn_weights": (True,),
    },
    read=read_qwen,
    write=write_qwen,
    gguf=QWEN2_GGUF,
    chat=(CHATML_CHAT,),
)


def read_qwen3(settings: Settings) -> TransformerConfig:
    """A Qwen3's config from its config.json."""
    windowed = settings["use_sliding_window"] and settings["sliding_window"] is not None
    full = settings["max_window_layers"] if windowed else settings["num_hidden_layers"]
    layers = range(settings["num_hidden_layers"])
    kinds = ["full_attention" if layer < full else "sliding_attention" for layer in layers]
    window = settings["sliding_window"] if windowed else None
    windows = read_windows({**settings, "sliding_window": window}, kinds)
    base = read_llama({**settings, "layer_types": None, "mlp_bias": False})
    norms = RMSNormConfig(epsilon=settings["rms_norm_eps"])
    return replace(base, attention=replace(base.attention, windows=windows, query_key_norm=norms))


def read_qwen2(settings: Settings) -> TransformerConfig:
    """A Qwen2's config from its config.json."""
    base = read_qwen3({**settings, "attention_bias": False})
    return replace(base, attention=replace(base.attention, bias=True, query_key_norm=None))


def write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    """A Qwen3's config.json."""
    settings = write_llama(config) | {"use_sliding_window": False}
    del settings["mlp_bias"]
    windows = config.windows
    if not any(windows):
        return settings
    first = next(layer for layer, window in enumerate(windows) if window)
    return (
        settings
        | write_windows(config)
        | {
            "use_sliding_window": True,
            "max_window_layers": first,  # what versions go by that know no layer_types
        }
    )


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """A Qwen2's config.json."""
    settings = write_qwen3(config)
    del settings["attention_bias"]
    return settings


def chatml(default_system: str, **fields: Any) -> dict[str, Any]:
    """ChatML as Qwen's models have it since the second: texts that meet are encoded together."""
    messages = {
        role: ("<|im_start|>", f"{role}\n", "{content}", "<|im_end|>", "\n")
        for role in ("system", "user", "assistant")
    }
    return {
        "special": ("<|im_start|>", "<|im_end|>"),
        **messages,
        "default_system": default_system,
        "joined": True,
        "stop": ("<|im_end|>", "<|im_start|>"),
        **fields,
    }


QWEN2_CHATS = (
    ChatStyle(
        "qwen2.5",
        chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        tokens=("<|object_ref_start|>",),
    ),
    ChatStyle("qwen2", chatml("You are a helpful assistant.")),
)
QWEN2_DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read_qwen2,
    write=write_qwen2,
    defaults=QWEN2_DEFAULTS,
    chat=QWEN2_CHATS,
    gguf=QWEN2_GGUF,
)
QWEN3_FAMILY = dataclasses.replace(
    QWEN2_FAMILY,
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    names=(
        *LLAMA_FAMILY.names,
        *norm(f"{LAYER}.self_attn.q_norm", "blocks.attention.query_norm"),
        *norm(f"{LAYER}.self_attn.k_norm", "blocks.attention.key_norm"),
    ),
    read=read_qwen3,
    write=write_qwen3,
    defaults=QWEN2_DEFAULTS | {"head_dim": 128},
    chat=(ChatStyle("qwen3", chatml("", thoughts=("<think>", "</think>"))),),
    gguf=QWEN3_GGUF,
)
register(QWEN2_FAMILY, QWEN3_FAMILY, QWEN_FAMILY)
