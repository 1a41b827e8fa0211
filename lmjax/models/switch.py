"""Switch Transformers: T5 with one expert a token."""

from __future__ import annotations

from lmjax.config import preset, replace
from lmjax.models.encoder_decoder import EncoderDecoderConfig
from lmjax.models.experts import ExpertsConfig
from lmjax.models.gpt import size_of
from lmjax.models.initializers import FanIn
from lmjax.models.routing import TopKRouter
from lmjax.models.t5 import t5


@preset
def switch(size: str = "C") -> EncoderDecoderConfig:
    """Switch-C, 1.6 T parameters (Fedus et al. 2021, arXiv:2101.03961, table 9).

    The paper's other sizes have experts in every second layer; all layers here are alike.
    """
    size_of({"C": ()}, size, "switch")
    base, head_dim = t5(), 64
    return replace(
        base,
        hidden=2080,
        num_layers=15,
        encoder_layers=15,
        attention=replace(base.attention, num_heads=32, head_dim=head_dim),
        feed_forward=ExpertsConfig(
            size=6144,
            activation="relu",
            gated=False,
            experts=2048,
            router=TopKRouter(chosen=1, normalise=False, capacity=1.25, jitter=0.01, z_loss=0.0),
        ),
        head_scale=2080**-0.5,
        initializer=FanIn(query_scale=head_dim**-0.5),
    )
