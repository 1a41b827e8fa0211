"""The rotary positions of a config.json, of before transformers 5 and after, and their context."""

from __future__ import annotations

import json
import math
from typing import Any

from lmjax.config import UserError
from lmjax.models.names import Settings
from lmjax.models.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    Rotary,
    RotaryScaling,
    YaRNScaling,
)
from lmjax.models.transformer import TransformerConfig

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# The kinds that transformers gives the context of before they were stretched.
WITH_ORIGINAL = ("yarn", "llama3", "longrope")
ROPE_SUPPORTED = {
    "rope_scaling.type": KINDS,
    "rope_scaling.rope_type": KINDS,
    "rope_parameters.rope_type": KINDS,
    # Rotations that are not the same in all layers.
    "rope_parameters.full_attention": (),
    "rope_parameters.sliding_attention": (),
}


def read_rope(settings: Settings) -> tuple[Rotary, int]:
    """Rotary positions, and the tokens of the longest text that they are made for.

    The context is `max_position_embeddings`, or what the scaling makes of the one that it was
    trained with: `factor` times `original_max_position_embeddings`, if that is more.

    Raises:
      UserError: scaling of a part of each head, which transformers does not compute either.
      KeyError: a kind of scaling without what it needs.
    """
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", settings.get("rope_theta"))
    base = 10_000.0 if base is None else base
    stated = settings["max_position_embeddings"]
    share = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if kind == "default":  # which rotates whole heads, whatever their share
        return Rotary(base=base), stated
    if share not in (None, 1):
        raise UserError(
            f'partial_rotary_factor={json.dumps(share)} is not supported with rope_type="{kind}",'
            " only 1.0"
        )
    original = rope.get("original_max_position_embeddings")
    if kind in WITH_ORIGINAL:
        original = settings.get("original_max_position_embeddings", original)
    original = original or stated
    factor = rope.get("factor") if kind == "longrope" else rope["factor"]
    if factor is None:
        factor = stated / original
    rotary = Rotary(base=base, scaling=_scaling(kind, rope, factor, stated, original))
    return rotary, max(stated, int(factor * original))


def _scaling(kind: str, rope: Settings, factor: Any, stated: Any, original: Any) -> RotaryScaling:
    """The scaling of one kind; `stated` is max_position_embeddings."""
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "dynamic":
        return DynamicScaling(factor=factor, length=stated)
    if kind == "llama3":
        return Llama3Scaling(
            factor=factor,
            length=original,
            fast=rope["high_freq_factor"],
            slow=rope["low_freq_factor"],
        )
    attention = rope.get("attention_factor")
    if kind == "longrope":
        if attention is None:
            growth = math.log(factor) / math.log(original) if factor > 1 else 0.0
            attention = math.sqrt(1 + growth)
        short, long = (tuple(map(float, rope[f"{part}_factor"])) for part in ("short", "long"))
        return LongRoPEScaling(short=short, long=long, length=original, attention=attention)
    scales = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    if attention is None and all(scales) and factor > 1:
        one, other = (0.1 * scale * math.log(factor) + 1 for scale in scales)
        attention = one / other
    return YaRNScaling(
        factor=factor,
        length=original,
        fast=rope.get("beta_fast") or 32,
        slow=rope.get("beta_slow") or 1,
        attention=attention,
        truncate=rope.get("truncate", True),
    )


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """The settings that `read_rope` reads, in the form that every version of transformers does."""
    positions, longest = config.attention.positions, config.max_length
    scaling = getattr(positions, "scaling", None)
    written: dict[str, Any] = {"rope_theta": getattr(positions, "base", 10_000.0)}
    if isinstance(scaling, DynamicScaling):
        longest = scaling.length  # to which transformers compares the length of a text
    if longest is not None:
        written["max_position_embeddings"] = longest
    if rope := _written(scaling, longest):
        written["rope_scaling"] = rope
    return written


def _written(scaling: RotaryScaling | None, longest: int | None) -> dict[str, Any]:
    """The `rope_scaling` of a scaling, of a model with this context."""
    if isinstance(scaling, LinearScaling):
        rope = {"rope_type": "linear", "factor": scaling.factor}
        if longest is not None:  # so that the context is not taken for the one of training
            rope["original_max_position_embeddings"] = int(longest // scaling.factor)
        return rope
    if isinstance(scaling, DynamicScaling):
        return {"rope_type": "dynamic", "factor": scaling.factor}
    if isinstance(scaling, YaRNScaling):
        rope = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.length,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
        }
        if scaling.attention is not None:
            rope["attention_factor"] = scaling.attention
        if not scaling.truncate:
            rope["truncate"] = False
        return rope
    if isinstance(scaling, LongRoPEScaling):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "original_max_position_embeddings": scaling.length,
            "attention_factor": scaling.attention,
        }
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.length,
            "high_freq_factor": scaling.fast,
            "low_freq_factor": scaling.slow,
        }
    return {}
