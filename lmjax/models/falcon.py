"""Falcon: attention and feed-forward side by side, few key heads, no biases but in norms."""

from __future__ import annotations

import json
from typing import Any

from lmjax.config import UserError, preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.bloom import LAYER, SUBLAYERS
from lmjax.models.family import ChatStyle, ModelFamily, register
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.gguf_layout import FALCON_GGUF
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import GPT_HEADS
from lmjax.models.initializers import Normal
from lmjax.models.names import (
    ACTIVATIONS,
    Name,
    Settings,
    VocabularyTable,
    activation_name,
    norm,
)
from lmjax.models.residual import Parallel
from lmjax.models.rope_settings import ROPE_SUPPORTED, read_rope, write_rope
from lmjax.models.rotary import Rotary
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads, key-value heads
FALCON_SIZES = {"7B": (32, 4544, 71, 1), "40B": (60, 8192, 128, 8)}


@preset
def falcon(size: str = "7B") -> TransformerConfig:
    """Falcon (Almazrouei et al. 2023, arXiv:2311.16867): 7B with one norm a block, 40B with two."""
    layers, hidden, heads, kv_heads = size_of(FALCON_SIZES, size, "falcon")
    return TransformerConfig(
        vocab_size=65_024,
        hidden=hidden,
        num_layers=layers,
        max_length=2048,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=64,
            bias=False,
            output_bias=False,
            positions=Rotary(),
        ),
        feed_forward=FeedForwardConfig(size=4 * hidden, activation="gelu", bias=False),
        positions=None,
        arrangement=Parallel(shared_norm=size == "7B"),
        initializer=Normal(std=0.02),
    )


def read_falcon(settings: Settings) -> TransformerConfig:
    """A Falcon's config from its config.json."""
    hidden = settings["hidden_size"]
    heads = settings["num_attention_heads"]
    grouped = settings["new_decoder_architecture"]
    kv_heads = settings["num_kv_heads"] or heads
    if not grouped:
        kv_heads = 1 if settings["multi_query"] else heads
    norms = settings["num_ln_in_parallel_attn"] or (2 if grouped else 1)
    if norms not in ((1, 2) if grouped else (1,)):
        raise UserError(
            f"num_ln_in_parallel_attn={norms} is not supported with"
            f" new_decoder_architecture={json.dumps(grouped)}, only {'1, 2' if grouped else '1'}"
        )
    rotary, length = read_rope(settings)
    base = falcon()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=settings["num_hidden_layers"],
        max_length=max(length, settings.get("seq_length") or 0),
        attention=replace(
            base.attention,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads,
            bias=settings["bias"],
            output_bias=settings["bias"],
            positions=rotary,
            dropout=settings["attention_dropout"],
        ),
        feed_forward=FeedForwardConfig(
            size=settings["ffn_hidden_size"] or 4 * hidden,
            activation=ACTIVATIONS[settings["activation"]],
            bias=settings["bias"],
        ),
        norm=replace(base.norm, epsilon=settings["layer_norm_epsilon"]),
        arrangement=Parallel(shared_norm=norms == 1),
        dropout=settings["hidden_dropout"],
        tied_head=settings["tie_word_embeddings"],
    )


def write_falcon(config: TransformerConfig) -> dict[str, Any]:
    """A Falcon's config.json."""
    attention = config.attention
    norms = 1 if getattr(config.arrangement, "shared_norm", True) else 2
    # One norm and groups of heads: Falcon-11B.
    grouped = norms == 2 or attention.kv_heads not in (1, attention.num_heads)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_kv_heads": attention.kv_heads,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": norms,
        "multi_query": attention.kv_heads == 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": attention.bias,
        **write_rope(config),
        "activation": activation_name(config),
        "ffn_hidden_size": config.feed_forward.size,
        "layer_norm_epsilon": config.norm.epsilon,
        "hidden_dropout": config.dropout,
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": config.tied_head,
    }


FALCON_CHAT = ChatStyle(
    "falcon",
    {
        "user": ("User: {content}\n\n",),
        "assistant": ("Assistant:", " {content}\n\n"),
        "joined": True,
        "stop_strings": ("\nUser:",),
    },
    when=lambda config: config.num_layers < 80,
)
FALCON_180B_CHAT = ChatStyle(
    "falcon_180b",
    {
        "system": ("System: {content}\n",),
        "user": ("User: {content}\n",),
        "assistant": ("Falcon:", " {content}\n"),
        "joined": True,
        "stop_strings": ("\nUser:",),
    },
    when=lambda config: config.num_layers >= 80,
)
FALCON_FAMILY = ModelFamily(
    name="falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    names=(
        Name("transformer.word_embeddings.weight", ("embedding.table",), VocabularyTable()),
        *norm(f"{LAYER}.input_layernorm", "blocks.norm"),
        *norm(f"{LAYER}.ln_attn", "blocks.attention_norm"),
        *norm(f"{LAYER}.ln_mlp", "blocks.feed_forward_norm"),
        *SUBLAYERS,
        *norm("transformer.ln_f", "final_norm"),
        Name("lm_head.weight", ("head.table",), VocabularyTable()),
    ),
    prefix="transformer.",
    tied=("lm_head.weight", "transformer.word_embeddings.weight"),
    buffers=(r".*rotary_emb\.inv_freq",),
    supported=ROPE_SUPPORTED
    | {
        "activation": tuple(ACTIVATIONS),
        "alibi": (False,),
        "parallel_attn": (True,),
        "apply_residual_connection_post_layernorm": (False,),
    },
    gguf=FALCON_GGUF,
    heads=GPT_HEADS,
    read=read_falcon,
    write=write_falcon,
    defaults={
        "num_kv_heads": None,
        "num_ln_in_parallel_attn": None,
        "new_decoder_architecture": False,
        "multi_query": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    },
    aliases={"n_embed": "hidden_size"},
    former={  # RefinedWeb's
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
    },
    chat=(FALCON_CHAT, FALCON_180B_CHAT),
)
register(FALCON_FAMILY)
