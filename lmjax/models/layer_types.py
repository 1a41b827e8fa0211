"""The windows of a config.json, which names the kind of every layer since transformers 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.models.names import Settings
from lmjax.models.stretches import pattern
from lmjax.models.transformer import TransformerConfig


def read_windows(settings: Settings, kinds: Sequence[str]) -> tuple[int | None, ...]:
    """The pattern of windows: those of `layer_types` or, where config.json has none, of `kinds`."""
    count, window = settings["num_hidden_layers"], settings["sliding_window"]
    given = kinds if settings.get("layer_types") is None else settings["layer_types"]
    if len(given) != count:
        raise UserError(f"layer_types has {len(given)} entries for {count} layers")
    if others := set(given) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"layer_types: {min(others)} is not supported, only full_attention and"
            " sliding_attention"
        )
    if window is None and "sliding_attention" in given:
        raise UserError("layer_types has sliding_attention, but config.json gives no window")
    return pattern([window if kind == "sliding_attention" else None for kind in given])


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """The settings that `read_windows` reads."""
    windows = config.windows
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {
        # transformers' Gemma 2 wants a number where no layer has a window, too.
        "sliding_window": next((window for window in windows if window), config.max_length),
        "layer_types": kinds,
    }
