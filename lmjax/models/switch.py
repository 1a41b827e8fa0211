"""Switch Transformers: T5 with one expert a token."""

from __future__ import annotations

from lmjax.config import preset, replace
from lmjax.models.encoder_decoder import EncoderDecoderConfig
from lmjax.models.experts import ExpertsConfig
from lmjax.models.gpt import size_of
from lmjax.models.initializers import FanIn
from lmjax.models.routing import TopKRouter
from lmjax.models.t5 import t5

# layers of each stack, hidden, heads, feed-forward, experts, whether every layer is sparse
SIZES = {
    "base": (12, 768, 12, 3072, 128, False),
    "large": (24, 1024, 16, 4096, 128, False),
    "C": (15, 2080, 32, 6144, 2048, True),
}


@preset
def switch(size: str = "C") -> EncoderDecoderConfig:
    """Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, table 9): base, large, C.

    They have 7 B, 26 B and 1.6 T parameters; in the first two every second layer is sparse. Their
    feed-forward layers are those of T5, as in the public checkpoints' config.json.
    """
    layers, hidden, heads, width, experts, every = size_of(SIZES, size, "switch")
    base, head_dim = t5(), 64
    return replace(
        base,
        hidden=hidden,
        num_layers=layers,
        encoder_layers=layers,
        attention=replace(base.attention, num_heads=heads, head_dim=head_dim),
        feed_forward=ExpertsConfig(
            size=width,
            activation="relu",
            gated=False,
            experts=experts,
            router=TopKRouter(chosen=1, normalise=False, capacity=1.25, jitter=0.01, z_loss=0.0),
        ),
        alternate_feed_forward=None if every else replace(base.feed_forward, size=width),
        head_scale=hidden**-0.5,
        initializer=FanIn(query_scale=head_dim**-0.5),
    )
