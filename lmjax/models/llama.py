"""The LLaMA family: LLaMA and LLaMA 2."""

from __future__ import annotations

from lmjax.config import preset, replace
from lmjax.models.attention import AttentionConfig
from lmjax.models.feed_forward import GatedFeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.initializers import Normal
from lmjax.models.norms import RMSNormConfig
from lmjax.models.positions import Rotary
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
