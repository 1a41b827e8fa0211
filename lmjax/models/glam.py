"""GLaM: a decoder of which every second layer is a mixture of experts."""

from __future__ import annotations

from lmjax.config import preset
from lmjax.models.attention import AttentionConfig
from lmjax.models.experts import ExpertsConfig
from lmjax.models.feed_forward import GatedFeedForwardConfig
from lmjax.models.gpt import size_of
from lmjax.models.norms import RMSNormConfig
from lmjax.models.positions import RelativeBuckets
from lmjax.models.routing import TopKRouter
from lmjax.models.transformer import TransformerConfig

# layers, hidden, heads, width of a head; hidden units are four times `hidden`
SIZES = {
    "0.1B": (12, 768, 12, 64),
    "1.7B": (24, 2048, 16, 128),
    "8B": (32, 4096, 32, 128),
    "64B": (64, 8192, 128, 128),
}


@preset
def glam(size: str = "64B") -> TransformerConfig:
    """GLaM with 64 experts (Du et al. 2022, arXiv:2112.06905, table 4): 0.1B, 1.7B, 8B, 64B.

    The sizes are those of the dense models that cost as much; the largest has 1.2 T parameters.
    Dense layers are gated, experts are not. Relative positions are one table for all layers here,
    of each layer there; capacity, norms and weights of the losses are chosen.
    """
    layers, hidden, heads, head_dim = size_of(SIZES, size, "glam")
    return TransformerConfig(
        vocab_size=256_000,
        hidden=hidden,
        num_layers=layers,
        max_length=1024,
        attention=AttentionConfig(
            num_heads=heads,
            head_dim=head_dim,
            bias=False,
            output_bias=False,
            positions=RelativeBuckets(),
        ),
        feed_forward=ExpertsConfig(
            size=4 * hidden,
            activation="gelu_tanh",
            gated=False,
            experts=64,
            router=TopKRouter(chosen=2, capacity=1.25),
        ),
        alternate_feed_forward=GatedFeedForwardConfig(size=4 * hidden, activation="gelu_tanh"),
        norm=RMSNormConfig(),
        positions=None,
    )
