"""Models of published runs that have no preset: Megatron's and MaxText's, by their sizes."""

from __future__ import annotations

from typing import Any

from lmjax.config import replace
from lmjax.models import FeedForwardConfig, TransformerConfig, gpt3, llama


def sized(model: TransformerConfig, **sizes: Any) -> TransformerConfig:
    """A model with other sizes: hidden, layers, heads, head_dim, units, vocab."""
    heads = sizes["heads"]
    attention = replace(
        model.attention,
        num_heads=heads,
        num_kv_heads=None,
        head_dim=sizes.get("head_dim", sizes["hidden"] // heads),
        windows=(None,),
    )
    return replace(
        model,
        hidden=sizes["hidden"],
        num_layers=sizes["layers"],
        vocab_size=sizes.get("vocab", model.vocab_size),
        attention=attention,
        feed_forward=replace(model.feed_forward, size=sizes.get("units", 4 * sizes["hidden"])),
    )


def megatron_model(hidden: int, layers: int, heads: int) -> TransformerConfig:
    """A GPT of Megatron's table."""
    return sized(gpt3("125M"), hidden=hidden, layers=layers, heads=heads, vocab=51_200)


def maxtext_model(scale: int) -> TransformerConfig:
    """MaxText's model of `global_parameter_scale`: doubled are heads and units, width, layers."""
    base, rest = divmod(scale.bit_length() - 1, 3)
    wide = 2 ** (base + (rest > 0))
    hidden = 2048 * 2 ** (base + (rest > 1))
    sizes = dict(heads=16 * wide, head_dim=128, units=7168 * wide, layers=16 * 2**base)
    return sized(llama("7B"), hidden=hidden, **sizes)


def maxtext_v4_model(hidden: int, layers: int, heads: int) -> TransformerConfig:
    """MaxText's 22B and 52B: heads of 256 and a plain feed-forward, which make the number."""
    model = replace(llama("7B"), feed_forward=FeedForwardConfig(bias=False))
    return sized(model, hidden=hidden, layers=layers, heads=heads, head_dim=256)


LLAMA_8B = replace(
    llama("7B"),
    vocab_size=128_256,
    max_length=8192,
    attention=replace(llama("7B").attention, num_kv_heads=8),
    feed_forward=replace(llama("7B").feed_forward, size=14_336),
    tied_head=False,
)
