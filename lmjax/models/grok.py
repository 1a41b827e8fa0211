"""Grok-1: a mixture of experts with norms before and after each sublayer."""

from __future__ import annotations

import math

from lmjax.config import preset
from lmjax.models.attention import AttentionConfig
from lmjax.models.experts import ExpertsConfig
from lmjax.models.gpt import size_of
from lmjax.models.norms import RMSNormConfig
from lmjax.models.residual import SandwichNorm
from lmjax.models.rotary import Rotary
from lmjax.models.routing import TopKRouter
from lmjax.models.transformer import TransformerConfig


@preset
def grok1(size: str = "314B") -> TransformerConfig:
    """Grok-1 (xAI 2024), as its public code (github.com/xai-org/grok-1) has it.

    Scores are multiplied by 1 / sqrt(128) and bent to lie within 30, embeddings multiplied by
    sqrt(hidden), logits by 1 / sqrt(3); the weights of a token's two experts are their
    probabilities among all eight.
    """
    size_of({"314B": ()}, size, "grok1")
    hidden = 6144
    return TransformerConfig(
        vocab_size=131_072,
        hidden=hidden,
        num_layers=64,
        max_length=8192,
        attention=AttentionConfig(
            num_heads=48,
            num_kv_heads=8,
            head_dim=128,
            bias=False,
            output_bias=False,
            positions=Rotary(),
            scale=1 / math.sqrt(128),
            softcap=30.0,
        ),
        feed_forward=ExpertsConfig(
            size=32_768,
            activation="gelu_tanh",
            experts=8,
            router=TopKRouter(chosen=2, normalise=False),
        ),
        norm=RMSNormConfig(epsilon=1e-5),
        positions=None,
        arrangement=SandwichNorm(),
        embedding_scale=math.sqrt(hidden),
        head_scale=1 / math.sqrt(3),
    )
