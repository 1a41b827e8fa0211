"""PaLM: attention and feed-forward side by side under one norm, one key head, no biases."""

from __future__ import annotations

from typing import Any

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.family import ModelFamily, register
from lmjax.models.feed_forward import GatedFeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.initializers import FanIn
from lmjax.models.names import ATTENTION, Matrix, Name, Settings, Vector, VocabularyTable
from lmjax.models.norms import LayerNormConfig
from lmjax.models.residual import Parallel
from lmjax.models.rotary import Rotary
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads
PALM_SIZES = {"8B": (32, 4096, 16), "62B": (64, 8192, 32), "540B": (118, 18_432, 48)}


@preset
def palm(size: str = "8B") -> TransformerConfig:
    """PaLM (Chowdhery et al. 2022, arXiv:2204.02311, table 1): 8B, 62B, 540B; heads of 256."""
    layers, hidden, heads = size_of(PALM_SIZES, size, "palm")
    return TransformerConfig(
        vocab_size=256_000,
        hidden=hidden,
        num_layers=layers,
        max_length=2048,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=1,
            head_dim=256,
            bias=False,
            output_bias=False,
            positions=Rotary(),
        ),
        feed_forward=GatedFeedForwardConfig(size=4 * hidden),
        norm=LayerNormConfig(bias=False),
        positions=None,
        arrangement=Parallel(),
        head_scale=hidden**-0.5,
        initializer=FanIn(),
    )


def read_palm(settings: Settings) -> TransformerConfig:
    """A PaLM's config from its sizes; no folder of Google's own is public."""
    base = palm()
    return replace(
        base,
        vocab_size=settings["vocab_size"],
        hidden=settings["hidden_size"],
        num_layers=settings["num_layers"],
        max_length=settings.get("max_length", 2048),
        attention=replace(
            base.attention,
            num_heads=settings["num_heads"],
            head_dim=settings["head_dim"],
            positions=Rotary(base=float(settings.get("rope_base", 10_000))),
        ),
        feed_forward=GatedFeedForwardConfig(size=settings["feed_forward_size"]),
        norm=LayerNormConfig(epsilon=settings.get("layer_norm_epsilon", 1e-5), bias=False),
        head_scale=settings["hidden_size"] ** -0.5,
    )


def write_palm(config: TransformerConfig) -> dict[str, Any]:
    """The sizes that `read_palm` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_layers": config.num_layers,
        "num_heads": config.attention.num_heads,
        "head_dim": config.attention.head_dim,
        "max_length": config.max_length,
        "feed_forward_size": config.feed_forward.size,
        "rope_base": getattr(config.attention.positions, "base", 10_000.0),
        "layer_norm_epsilon": config.norm.epsilon,
    }


FUSED = (*ATTENTION, "blocks.feed_forward.up", "blocks.feed_forward.gate")
LAYER = "{layer_from_1}.fn"
# The layout of lucidrains/PaLM-pytorch, the only one in use.
PALM_FAMILY = ModelFamily(
    name="palm",
    model_type="palm",
    architecture="PaLM",
    names=(
        Name("0.weight", ("embedding.table",), VocabularyTable()),
        Name(f"{LAYER}.norm.gamma", ("blocks.norm.scale",), Vector()),
        Name(
            f"{LAYER}.fused_attn_ff_proj.weight",
            tuple(f"{layer}.weight" for layer in FUSED),
            Matrix(),
        ),
        Name(f"{LAYER}.attn_out.weight", ("blocks.attention.output.weight",), Matrix(inputs=2)),
        Name(f"{LAYER}.ff_out.1.weight", ("blocks.feed_forward.down.weight",), Matrix()),
        Name("{end}.gamma", ("final_norm.scale",), Vector()),
    ),
    prefix="",
    tied=("head.weight", "0.weight"),
    buffers=(r".*\.beta", r".*rotary_emb\.inv_freq"),
    supported={},
    read=read_palm,
    write=write_palm,
)
register(PALM_FAMILY)
