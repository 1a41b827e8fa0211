"""Mistral: a LLaMA with grouped queries that sees a sliding window."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lmjax.config import UserError, preset, replace
from lmjax.models.family import ChatStyle, register
from lmjax.models.gpt import size_of
from lmjax.models.head_classes import ANSWERS, LLAMA_TOKENS, SCORE
from lmjax.models.llama import LLAMA_DEFAULTS, LLAMA_FAMILY, llama, read_llama, write_llama
from lmjax.models.names import Settings
from lmjax.models.transformer import TransformerConfig


@preset
def mistral(size: str = "7B") -> TransformerConfig:
    """Mistral 7B v0.1 (Jiang et al. 2023, arXiv:2310.06825, table 1)."""
    size_of({"7B": ()}, size, "mistral")
    base = llama()
    return replace(
        base,
        max_length=32_768,
        attention=replace(base.attention, num_kv_heads=8, windows=(4096,)),
        feed_forward=replace(base.feed_forward, size=14_336),
        norm=replace(base.norm, epsilon=1e-5),
    )


def read_mistral(settings: Settings) -> TransformerConfig:
    """A Mistral's config from its config.json; all its layers see one window."""
    window = settings["sliding_window"]
    usual = "full_attention" if window is None else "sliding_attention"
    if others := set(settings.get("layer_types") or ()) - {usual}:
        raise UserError(
            f"layer_types: {min(others)} is not supported for mistral with"
            f" sliding_window={json.dumps(window)}, only {usual}"
        )
    base = read_llama({**settings, "layer_types": None} | WITHOUT_BIASES)
    return replace(base, attention=replace(base.attention, windows=(window,)))


def write_mistral(config: TransformerConfig) -> dict[str, Any]:
    """A Mistral's config.json."""
    settings = write_llama(config) | {"sliding_window": config.attention.windows[0]}
    return {key: value for key, value in settings.items() if key not in WITHOUT_BIASES}


WITHOUT_BIASES = {"attention_bias": False, "mlp_bias": False}  # whatever config.json says
MISTRAL_CHAT = ChatStyle(
    "mistral",
    {
        "special": ("<s>", "</s>"),
        "start": ("<s>",),
        "user": ("[INST] {content} [/INST]",),
        "assistant": (" {content}", "</s>"),
        "joined": True,
        "strip": True,
        "forbidden": ("[INST]", "[/INST]"),
    },
    of="its Instruct v0.1 or v0.2",
)
MISTRAL_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    heads=(SCORE, LLAMA_TOKENS, ANSWERS),
    read=read_mistral,
    write=write_mistral,
    defaults=LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    chat=(MISTRAL_CHAT,),
)
register(MISTRAL_FAMILY)
