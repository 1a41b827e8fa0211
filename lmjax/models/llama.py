"""The LLaMA family: LLaMA, LLaMA 2, and Skywork, which is one in all but its sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmjax.config import UserError, preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ChatStyle, ModelFamily, register
from lmjax.models.feed_forward import GatedFeedForwardConfig
from lmjax.models.gguf_layout import LLAMA_GGUF
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import LLAMA_HEADS
from lmjax.models.initializers import Normal
from lmjax.models.names import (
    ACTIVATIONS,
    Matrix,
    Name,
    Settings,
    VocabularyTable,
    activation_name,
    dense,
    norm,
)
from lmjax.models.norms import RMSNormConfig
from lmjax.models.rope_settings import ROPE_SUPPORTED, read_rope, write_rope
from lmjax.models.rotary import Rotary
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads, key-value heads, feed-forward, norm epsilon
LLAMA_SIZES = {
    "7B": (32, 4096, 32, 32, 11008, 1e-6),
    "13B": (40, 5120, 40, 40, 13824, 1e-6),
    "33B": (60, 6656, 52, 52, 17920, 1e-6),
    "65B": (80, 8192, 64, 64, 22016, 1e-5),
}
LLAMA2_SIZES = {
    "7B": (32, 4096, 32, 32, 11008, 1e-5),
    "13B": (40, 5120, 40, 40, 13824, 1e-5),
    "70B": (80, 8192, 64, 8, 28672, 1e-5),
}


@preset
def llama(size: str = "7B") -> TransformerConfig:
    """LLaMA (Touvron et al. 2023a, table 2): 7B, 13B, 33B, 65B."""
    layers, hidden, heads, kv_heads, mlp, epsilon = size_of(LLAMA_SIZES, size, "llama")
    return TransformerConfig(
        vocab_size=32_000,
        hidden=hidden,
        num_layers=layers,
        max_length=2048,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads,
            bias=False,
            output_bias=False,
            positions=Rotary(),
        ),
        feed_forward=GatedFeedForwardConfig(size=mlp),
        norm=RMSNormConfig(epsilon=epsilon),
        positions=None,
        tied_head=False,
        initializer=Normal(std=0.02),
    )


@preset
def llama2(size: str = "7B") -> TransformerConfig:
    """LLaMA 2 (Touvron et al. 2023b): 7B, 13B, and 70B with grouped queries; length 4096."""
    layers, hidden, heads, kv_heads, mlp, epsilon = size_of(LLAMA2_SIZES, size, "llama2")
    base = llama()
    return replace(
        base,
        hidden=hidden,
        num_layers=layers,
        max_length=4096,
        attention=replace(
            base.attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads
        ),
        feed_forward=replace(base.feed_forward, size=mlp),
        norm=replace(base.norm, epsilon=epsilon),
    )


@preset
def skywork(size: str = "13B") -> TransformerConfig:
    """Skywork-13B (Wei et al. 2023, arXiv:2310.19341, table 3): a deeper, narrower LLaMA.

    The report counts 65,536 tokens; the released config has 65,519.
    """
    size_of({"13B": ()}, size, "skywork")
    base = llama()
    return replace(
        base,
        vocab_size=65_519,
        hidden=4608,
        num_layers=52,
        max_length=4096,
        attention=replace(base.attention, num_heads=36, num_kv_heads=36, head_dim=128),
        feed_forward=replace(base.feed_forward, size=12_288),
    )


def read_llama(settings: Settings) -> TransformerConfig:
    """A LLaMA's config from its config.json, of before or after transformers 5."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    rotary, length = read_rope(settings)
    kinds = set(settings.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise UserError(f"layer_types: {min(kinds)} is not supported, only full_attention")
    return replace(
        llama(),
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_hidden_layers"],
        # The first conversions gave the context another name.
        max_length=max(length, settings.get("max_sequence_length") or 0),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=settings["num_key_value_heads"] or heads,
            head_dim=settings.get("head_dim") or hidden // heads,
            bias=settings["attention_bias"],
            output_bias=settings["attention_bias"],
            positions=rotary,
            dropout=settings["attention_dropout"],
        ),
        feed_forward=GatedFeedForwardConfig(
            size=settings["intermediate_size"],
            activation=ACTIVATIONS[settings["hidden_act"]],
            bias=settings["mlp_bias"],
        ),
        norm=RMSNormConfig(epsilon=settings["rms_norm_eps"]),
        tied_head=settings["tie_word_embeddings"],
    )


def write_llama(config: TransformerConfig) -> dict[str, Any]:
    """A LLaMA's config.json, in the form that every version of transformers reads."""
    attention = config.attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "attention_dropout": attention.dropout,
        "intermediate_size": config.feed_forward.size,
        "mlp_bias": config.feed_forward.bias,
        "hidden_act": activation_name(config),
        "rms_norm_eps": config.norm.epsilon,
        "tie_word_embeddings": config.tied_head,
        **write_rope(config),
    }


LAYER = "model.layers.{layer}"
LLAMA_SUPPORTED = ROPE_SUPPORTED | {"hidden_act": tuple(ACTIVATIONS)}
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LLAMA2_CHAT = ChatStyle(
    "llama2",
    {
        "special": ("<s>", "</s>"),
        "system": ("<<SYS>>\n{content}\n<</SYS>>\n\n",),
        "user": ("<s>", "[INST] {system}{content} [/INST]"),
        "assistant": (" {content} ", "</s>"),
        "joined": True,
        "strip": True,
        "forbidden": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    },
    of="LLaMA 2 Chat",
)
LLAMA_FAMILY = ModelFamily(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=(
        Name("model.embed_tokens.weight", ("embedding.table",), VocabularyTable()),
        *norm(f"{LAYER}.input_layernorm", "blocks.attention_norm"),
        *dense(f"{LAYER}.self_attn.q_proj", "blocks.attention.query", transform=Matrix()),
        *dense(f"{LAYER}.self_attn.k_proj", "blocks.attention.key", transform=Matrix()),
        *dense(f"{LAYER}.self_attn.v_proj", "blocks.attention.value", transform=Matrix()),
        *dense(f"{LAYER}.self_attn.o_proj", "blocks.attention.output", transform=Matrix(inputs=2)),
        *norm(f"{LAYER}.post_attention_layernorm", "blocks.feed_forward_norm"),
        *dense(f"{LAYER}.mlp.gate_proj", "blocks.feed_forward.gate", transform=Matrix()),
        *dense(f"{LAYER}.mlp.up_proj", "blocks.feed_forward.up", transform=Matrix()),
        *dense(f"{LAYER}.mlp.down_proj", "blocks.feed_forward.down", transform=Matrix()),
        *norm("model.norm", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="model.",
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    buffers=(r".*rotary_emb\.inv_freq",),
    supported=LLAMA_SUPPORTED,
    heads=LLAMA_HEADS,
    read=read_llama,
    write=write_llama,
    defaults=LLAMA_DEFAULTS,
    chat=(LLAMA2_CHAT,),
    gguf=LLAMA_GGUF,
)
SKYWORK_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    name="skywork",
    model_type="skywork",
    architecture="SkyworkForCausalLM",
    heads=(),
    chat=(),
)
register(LLAMA_FAMILY, SKYWORK_FAMILY)
