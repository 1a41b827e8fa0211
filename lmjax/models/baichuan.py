"""Baichuan and Baichuan 2: LLaMA's block; the 13B ones have ALiBi, the second has NormHead."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmjax.config import preset, replace
from lmjax.models.family import ChatStyle, register
from lmjax.models.gpt import size_of
from lmjax.models.initializers import Normal
from lmjax.models.llama import (
    LAYER,
    LLAMA_DEFAULTS,
    LLAMA_FAMILY,
    llama,
    read_llama,
    write_llama,
)
from lmjax.models.names import ATTENTION, Matrix, Settings, dense
from lmjax.models.positions import ALiBi
from lmjax.models.transformer import TransformerConfig

BAICHUAN2_VOCABULARY = 125_696


@preset
def baichuan(size: str = "7B") -> TransformerConfig:
    """Baichuan-7B (rotary) and Baichuan-13B (ALiBi): sizes from their public config.json."""
    size_of({"7B": (), "13B": ()}, size, "baichuan")
    base = replace(llama(), vocab_size=64_000, max_length=4096)
    if size == "7B":
        return base
    return replace(
        base,
        max_length=None,
        hidden=5120,
        num_layers=40,
        attention=replace(
            base.attention, num_heads=40, num_kv_heads=40, head_dim=128, positions=ALiBi()
        ),
        feed_forward=replace(base.feed_forward, size=13_696),
    )


@preset
def baichuan2(size: str = "7B") -> TransformerConfig:
    """Baichuan 2 (Yang et al. 2023, arXiv:2309.10305): a larger vocabulary and NormHead."""
    size_of({"7B": (), "13B": ()}, size, "baichuan2")
    return replace(
        baichuan(size),
        vocab_size=BAICHUAN2_VOCABULARY,
        normalized_head=True,
        initializer=Normal(std=0.02, uniform_head=True),
    )


def read_baichuan(settings: Settings) -> TransformerConfig:
    """A Baichuan's config from its config.json.

    No key of it tells the four models apart: those with ALiBi have no max_position_embeddings, and
    Baichuan 2 has a vocabulary and a tokenizer class of its own.
    """
    length = settings.get("max_position_embeddings")
    usual = settings.get("model_max_length", 4096)
    base = read_llama({"max_position_embeddings": usual, **settings})
    if length is None:
        attention = replace(base.attention, positions=ALiBi())
        base = replace(base, attention=attention, max_length=None)
    second = (
        settings["vocab_size"] == BAICHUAN2_VOCABULARY
        or settings.get("tokenizer_class") == "BaichuanTokenizer"
    )
    return replace(base, normalized_head=second)


def write_baichuan(config: TransformerConfig) -> dict[str, Any]:
    """A Baichuan's config.json."""
    settings = write_llama(config)
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "rope_theta"):
        del settings[key]
    if config.max_length is not None:
        settings["model_max_length"] = config.max_length
    if isinstance(config.attention.positions, ALiBi):
        settings.pop("max_position_embeddings", None)
    if config.normalized_head:
        settings["tokenizer_class"] = "BaichuanTokenizer"
    return settings


BAICHUAN_CHAT = ChatStyle(
    "baichuan",
    {
        "special": ("<reserved_102>", "<reserved_103>", "</s>"),
        "user": ("<reserved_102>", "{content}"),
        "assistant": ("<reserved_103>", "{content}", "</s>"),
        "stop": ("<reserved_102>",),
    },
    when=lambda config: not config.normalized_head,
)
BAICHUAN2_CHAT = ChatStyle(
    "baichuan2",
    {
        "special": ("<reserved_106>", "<reserved_107>"),
        "system": ("{content}",),
        "user": ("<reserved_106>", "{content}"),
        "assistant": ("<reserved_107>", "{content}"),
        "stop": ("<reserved_106>",),
    },
    when=lambda config: config.normalized_head,
)
BAICHUAN_FAMILY = dataclasses.replace(
    LLAMA_FAMILY,
    name="baichuan",
    model_type="baichuan",
    architecture="BaichuanForCausalLM",
    heads=(),
    names=(
        *(
            name
            for name in LLAMA_FAMILY.names
            if not any(part in name.theirs for part in ("q_proj", "k_proj", "v_proj"))
        ),
        *dense(f"{LAYER}.self_attn.W_pack", *ATTENTION, transform=Matrix()),
    ),
    read=read_baichuan,
    write=write_baichuan,
    defaults={k: v for k, v in LLAMA_DEFAULTS.items() if k != "max_position_embeddings"},
    chat=(BAICHUAN_CHAT, BAICHUAN2_CHAT),
)
register(BAICHUAN_FAMILY)
