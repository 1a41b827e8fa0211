"""Mixtral: a Mistral whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmjax.config import UserError, preset, replace
from lmjax.models.experts import ExpertsConfig
from lmjax.models.family import register
from lmjax.models.gpt import size_of
from lmjax.models.llama import LAYER, LLAMA_DEFAULTS, LLAMA_SUPPORTED, llama
from lmjax.models.mistral import MISTRAL_CHAT, MISTRAL_FAMILY, read_mistral, write_mistral
from lmjax.models.names import Matrix, Name, Settings
from lmjax.models.rotary import Rotary
from lmjax.models.routing import TopKRouter
from lmjax.models.transformer import TransformerConfig

ROPE_BASE = 1e6
# layers, hidden, heads, feed-forward of an expert, length
MIXTRAL_SIZES = {
    "8x7B": (32, 4096, 32, 14_336, 32_768),
    "8x22B": (56, 6144, 48, 16_384, 65_536),
}


@preset
def mixtral(size: str = "8x7B") -> TransformerConfig:
    """Mixtral 8x7B v0.1 (Jiang et al. 2024, arXiv:2401.04088, table 1), and 8x22B v0.1.

    Of the second the sizes are those of its public config.json. No token is dropped.
    """
    layers, hidden, heads, mlp, length = size_of(MIXTRAL_SIZES, size, "mixtral")
    base = llama()
    return replace(
        base,
        hidden=hidden,
        num_layers=layers,
        max_length=length,
        attention=replace(
            base.attention, num_heads=heads, num_kv_heads=8, positions=Rotary(base=ROPE_BASE)
        ),
        feed_forward=ExpertsConfig(size=mlp, experts=8, router=TopKRouter(chosen=2)),
        norm=replace(base.norm, epsilon=1e-5),
    )


def read_mixtral(settings: Settings) -> TransformerConfig:
    """A Mixtral's config from its config.json."""
    if settings["num_experts_per_tok"] == 1:  # whose weight is 1 there, whatever the router says
        raise UserError("num_experts_per_tok=1 is not supported for mixtral, only 2 or more")
    # Older files that do not say have transformers' default for Mixtral.
    base = read_mistral({**settings, "rope_theta": settings.get("rope_theta") or ROPE_BASE})
    router = TopKRouter(
        chosen=settings["num_experts_per_tok"],
        jitter=settings["router_jitter_noise"],
    )
    experts = ExpertsConfig(
        size=base.feed_forward.size,
        activation=base.feed_forward.activation,
        experts=settings["num_local_experts"],
        router=router,
    )
    return replace(base, feed_forward=experts)


def write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    """A Mixtral's config.json."""
    experts = config.feed_forward
    if not isinstance(experts, ExpertsConfig):
        experts = ExpertsConfig()
    router = experts.router if isinstance(experts.router, TopKRouter) else TopKRouter()
    return write_mistral(config) | {
        "num_local_experts": experts.experts,
        "num_experts_per_tok": router.chosen,
        "router_jitter_noise": router.jitter,
    }


SPARSE = f"{LAYER}.block_sparse_moe"
EXPERT = SPARSE + ".experts.{expert}"
WEIGHTS = {
    f"{SPARSE}.gate": "router",
    f"{EXPERT}.w1": "experts.gate",
    f"{EXPERT}.w3": "experts.up",
    f"{EXPERT}.w2": "experts.down",
}
MIXTRAL_FAMILY = dataclasses.replace(
    MISTRAL_FAMILY,
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    names=(
        *(name for name in MISTRAL_FAMILY.names if ".mlp." not in name.theirs),
        *(
            Name(f"{theirs}.weight", (f"blocks.feed_forward.{ours}.weight",), Matrix())
            for theirs, ours in WEIGHTS.items()
        ),
    ),
    supported=LLAMA_SUPPORTED | {"num_local_experts": None},
    read=read_mixtral,
    write=write_mixtral,
    defaults=LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
    },
    aliases={"num_experts": "num_local_experts"},
    chat=(dataclasses.replace(MISTRAL_CHAT, of="Mixtral Instruct v0.1"),),
)
register(MIXTRAL_FAMILY)
