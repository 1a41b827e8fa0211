"""Falcon: attention and feed-forward side by side, few key heads, no biases but in norms."""

from __future__ import annotations

from typing import Any

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.bloom import LAYER, SUBLAYERS
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.initializers import Normal
from lmjax.models.names import Family, Name, Settings, VocabularyTable, norm
from lmjax.models.residual import Parallel
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
    """A Falcon's config from its config.json (RefinedWeb's old names, n_layer and n_head, too)."""
    hidden = settings["hidden_size"]
    heads = settings.get("num_attention_heads") or settings["n_head"]
    layers = settings.get("num_hidden_layers") or settings["n_layer"]
    grouped = settings.get("new_decoder_architecture", False)
    kv_heads = settings.get("num_kv_heads") or settings.get("n_head_kv") or heads
    if not grouped:
        kv_heads = 1 if settings.get("multi_query", True) else heads
    norms = settings.get("num_ln_in_parallel_attn") or (2 if grouped else 1)
    rotary = {**settings, **(settings.get("rope_parameters") or {})}
    base = falcon()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=hidden,
        num_layers=layers,
        max_length=settings.get("max_position_embeddings") or 2048,
        attention=replace(
            base.attention,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads,
            bias=settings.get("bias", False),
            output_bias=settings.get("bias", False),
            positions=Rotary(base=float(rotary.get("rope_theta", 10_000.0))),
            dropout=settings.get("attention_dropout", 0.0),
        ),
        feed_forward=FeedForwardConfig(
            size=settings.get("ffn_hidden_size") or 4 * hidden,
            activation="gelu",
            bias=settings.get("bias", False),
        ),
        norm=replace(base.norm, epsilon=settings.get("layer_norm_epsilon", 1e-5)),
        arrangement=Parallel(shared_norm=norms == 1),
        dropout=settings.get("hidden_dropout", 0.0),
        tied_head=settings.get("tie_word_embeddings", True),
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
        "max_position_embeddings": config.max_length,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": norms,
        "multi_query": attention.kv_heads == 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": attention.bias,
        "rope_theta": getattr(attention.positions, "base", 10_000.0),
        "ffn_hidden_size": config.feed_forward.size,
        "layer_norm_epsilon": config.norm.epsilon,
        "hidden_dropout": config.dropout,
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": config.tied_head,
    }


FALCON_FAMILY = Family(
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
    supported={
        "activation": ("gelu",),
        "alibi": (False,),
        "parallel_attn": (True,),
        "apply_residual_connection_post_layernorm": (False,),
        "rope_scaling.type": ("default",),
        "rope_scaling.rope_type": ("default",),
        "rope_parameters.rope_type": ("default",),
        "quantization_config": (),
    },
    read=read_falcon,
    write=write_falcon,
)
