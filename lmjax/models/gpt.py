"""The GPT family: GPT-1, GPT-2 and GPT-3."""

from __future__ import annotations

from lmjax.config import UserError, preset
from lmjax.models.attention import AttentionConfig
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.initializers import Normal
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
