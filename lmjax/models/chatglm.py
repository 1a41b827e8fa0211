"""ChatGLM: GLM-130B's block with two rotations; ChatGLM2 and 3: LLaMA's with few key heads."""

from __future__ import annotations

import math
from typing import Any

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ChatStyle, ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig, GatedFeedForwardConfig
from lmjax.models.gguf_layout import CHATGLM_GGUF
from lmjax.models.glm import GLM_MASKS, glm_blocks
from lmjax.models.gpt import size_of
from lmjax.models.infill import BlankFormat
from lmjax.models.initializers import DeepNormXavier, Normal
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
from lmjax.models.norms import LayerNormConfig, RMSNormConfig
from lmjax.models.residual import DeepNorm
from lmjax.models.rotary import BlockRotary, LinearScaling, Rotary
from lmjax.models.transformer import TransformerConfig

# Of ChatGLM-6B's 28 layers, also in its models of other depths: a default of its class.
RESIDUAL_SCALE = math.sqrt(2 * 28)


@preset
def chatglm(size: str = "6B") -> TransformerConfig:
    """ChatGLM-6B, the last release: sizes from its public config.json and modelling file.

    A context that sees itself whole and ends with [MASK] or [gMASK] is followed by an answer that
    has the mask's position and block positions of its own. How it was drawn is not published:
    the initialisation is GLM-130B's.
    """
    size_of({"6B": ()}, size, "chatglm")
    return TransformerConfig(
        vocab_size=130_528,  # the first release has 150,528
        hidden=4096,
        num_layers=28,
        max_length=2048,
        attention=AttentionConfig(num_heads=32, head_dim=128, positions=BlockRotary()),
        feed_forward=FeedForwardConfig(size=16_384),
        positions=None,
        arrangement=DeepNorm(alpha=RESIDUAL_SCALE),
        initializer=DeepNormXavier(),
    )


@preset
def chatglm2(size: str = "6B") -> TransformerConfig:
    """ChatGLM2-6B: sizes from its public config.json; length 32,768."""
    size_of({"6B": ()}, size, "chatglm2")
    return TransformerConfig(
        vocab_size=65_024,
        hidden=4096,
        num_layers=28,
        max_length=32_768,
        attention=AttentionConfig(
            num_heads=32,
            num_kv_heads=2,
            head_dim=128,
            output_bias=False,
            positions=Rotary(fraction=0.5, interleaved=True),
        ),
        feed_forward=GatedFeedForwardConfig(size=13_696),
        norm=RMSNormConfig(epsilon=1e-5),
        positions=None,
        tied_head=False,
        initializer=Normal(std=0.02),
    )


@preset
def chatglm3(size: str = "6B") -> TransformerConfig:
    """ChatGLM3-6B: the network of ChatGLM2 at length 8192, with other chat tokens."""
    size_of({"6B": ()}, size, "chatglm3")
    return replace(chatglm2(), max_length=8192)


def read_chatglm(settings: Settings) -> TransformerConfig:
    """A ChatGLM-6B's config from its config.json."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    base = chatglm()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_layers"],
        max_length=settings.get("max_sequence_length", 2048),
        attention=replace(base.attention, num_heads=heads, head_dim=hidden // heads),
        feed_forward=FeedForwardConfig(size=settings["inner_hidden_size"]),
        norm=LayerNormConfig(epsilon=settings.get("layernorm_epsilon", 1e-5)),
    )


def write_chatglm(config: TransformerConfig) -> dict[str, Any]:
    """A ChatGLM-6B's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "inner_hidden_size": config.feed_forward.size,
        "max_sequence_length": config.max_length,
        "layernorm_epsilon": config.norm.epsilon,
        "position_encoding_2d": True,
    }


def read_chatglm2(settings: Settings) -> TransformerConfig:
    """A ChatGLM2's or ChatGLM3's config from its config.json."""
    base = chatglm2()
    heads = settings["num_attention_heads"]
    kv_heads = settings["multi_query_group_num"] if settings["multi_query_attention"] else heads
    bias = settings.get("add_bias_linear", False)
    # The variants of ChatGLM3 and 4 for long texts multiply the base, ChatGLM2's divides positions;
    # nothing but the name that it was published under tells them apart.
    positions, ratio = base.attention.positions, float(settings.get("rope_ratio") or 1)
    if "chatglm2" in str(settings.get("_name_or_path")).lower() and ratio != 1:
        positions = replace(positions, scaling=LinearScaling(factor=ratio))
    else:
        positions = replace(positions, base=10_000.0 * ratio)
    return replace(
        base,
        vocab_size=settings["padded_vocab_size"],
        hidden=settings["hidden_size"],
        num_layers=settings["num_layers"],
        max_length=settings["seq_length"],
        attention=replace(
            base.attention,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=settings["kv_channels"],
            bias=bias or settings.get("add_qkv_bias", False),
            output_bias=bias,
            positions=positions,
            dropout=settings.get("attention_dropout", 0.0),
        ),
        feed_forward=GatedFeedForwardConfig(size=settings["ffn_hidden_size"], bias=bias),
        norm=RMSNormConfig(epsilon=settings.get("layernorm_epsilon", 1e-5)),
        dropout=settings.get("hidden_dropout", 0.0),
        tied_head=settings.get("tie_word_embeddings", False),
    )


def write_chatglm2(config: TransformerConfig) -> dict[str, Any]:
    """A ChatGLM2's config.json."""
    attention = config.attention
    scaling = getattr(attention.positions, "scaling", None)
    ratio = getattr(attention.positions, "base", 10_000.0) / 10_000.0
    named = {}
    if isinstance(scaling, LinearScaling):
        named, ratio = {"_name_or_path": "THUDM/chatglm2-6b-32k"}, scaling.factor
    return named | {
        "padded_vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_layers": config.num_layers,
        "seq_length": config.max_length,
        "num_attention_heads": attention.num_heads,
        "kv_channels": attention.head_dim,
        "multi_query_attention": attention.kv_heads < attention.num_heads,
        "multi_query_group_num": attention.kv_heads,
        "add_qkv_bias": attention.bias,
        "add_bias_linear": attention.output_bias,
        "rope_ratio": ratio,
        "original_rope": True,
        "ffn_hidden_size": config.feed_forward.size,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "layernorm_epsilon": config.norm.epsilon,
        "hidden_dropout": config.dropout,
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": config.tied_head,
    }


CHATGLM_FAMILY = ModelFamily(
    name="chatglm",
    model_type="chatglm",
    architecture="ChatGLMModel",
    key="inner_hidden_size",
    names=(
        Name("transformer.word_embeddings.weight", ("embedding.table",), VocabularyTable()),
        *glm_blocks("transformer.layers.{layer}", Grouped(), "blocks.feed_forward.up"),
        *norm("transformer.final_layernorm", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.word_embeddings.weight"),
    buffers=(r".*rotary_emb\.inv_freq",),
    supported={
        "position_encoding_2d": (True,),
        "tie_word_embeddings": (True,),
        "pre_seq_len": (),
        "quantization_bit": (0,),
    },
    read=read_chatglm,
    write=write_chatglm,
    infill=BlankFormat(rest=GLM_MASKS, sop="<sop>", eop="<eop>"),
)
LAYER = "transformer.encoder.layers.{layer}"
CHATGLM2_CHAT = ChatStyle(
    "chatglm2",
    {
        "special": ("[gMASK]", "sop"),
        "start": ("[gMASK]", "sop"),
        "user": ("[Round {round}]\n\n问：{content}\n\n答：",),
        "assistant": ("{content}\n\n",),
        "joined": True,
    },
)
CHATGLM3_CHAT = ChatStyle(
    "chatglm3",
    {
        "special": ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "start": ("[gMASK]", "sop"),
        "system": ("<|system|>", "{metadata}\n", "{content}"),
        "user": ("<|user|>", "{metadata}\n", "{content}"),
        "assistant": ("<|assistant|>", "{metadata}\n", "{content}"),
        "observation": ("<|observation|>", "{metadata}\n", "{content}"),
        "tools": "{content}\n{tools}",
        "stop": ("<|user|>", "<|observation|>"),
    },
)
CHATGLM2_FAMILY = ModelFamily(
    name="chatglm2",
    model_type="chatglm",
    architecture="ChatGLMModel",
    names=(
        Name(
            "transformer.embedding.word_embeddings.weight", ("embedding.table",), VocabularyTable()
        ),
        *norm(f"{LAYER}.input_layernorm", "blocks.attention_norm"),
        *dense(f"{LAYER}.self_attention.query_key_value", *ATTENTION, transform=Matrix()),
        *dense(
            f"{LAYER}.self_attention.dense", "blocks.attention.output", transform=Matrix(inputs=2)
        ),
        *norm(f"{LAYER}.post_attention_layernorm", "blocks.feed_forward_norm"),
        *dense(
            f"{LAYER}.mlp.dense_h_to_4h",
            "blocks.feed_forward.gate",
            "blocks.feed_forward.up",
            transform=Matrix(),
        ),
        *dense(f"{LAYER}.mlp.dense_4h_to_h", "blocks.feed_forward.down", transform=Matrix()),
        *norm("transformer.encoder.final_layernorm", "final_norm"),
        Name("transformer.output_layer.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("transformer.output_layer.weight", "transformer.embedding.word_embeddings.weight"),
    buffers=(r".*rotary_pos_emb\.inv_freq",),
    supported={
        "rmsnorm": (True,),
        "post_layer_norm": (True,),
        "apply_residual_connection_post_layernorm": (False,),
        "original_rope": (True,),
        "pre_seq_len": (),
        "quantization_bit": (0,),
    },
    read=read_chatglm2,
    write=write_chatglm2,
    gguf=CHATGLM_GGUF,
    chat=(CHATGLM3_CHAT, CHATGLM2_CHAT),
)
register(CHATGLM2_FAMILY, CHATGLM_FAMILY)
