"""Checks of config.json files, before models are made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lmjax.config import UserError
from lmjax.interop.packed_formats import format_of
from lmjax.models import TransformerConfig
from lmjax.models.family import ModelFamily

# What no family is computed with, unless its own table says otherwise; see `ModelFamily.supported`.
SUPPORTED = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "transformers_weights": (),  # names another file of weights
    "per_layer_config": ({},),
    "is_causal": (True,),  # with which transformers makes encoders of its decoders
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, 1)),
}


def read_settings(folder: Path) -> Any:
    """Settings in a folder's config.json. UserError where there is none, or it is no JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a model folder: it holds no config.json") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def config_of(family: ModelFamily, settings: dict[str, Any]) -> TransformerConfig:
    """The model that a config.json of this family stands for.

    Raises:
      UserError: it lacks something, holds something of another kind than the family has there, or
        asks for what is not supported. The message names the key, but not the file.
    """
    format_of(settings)
    settings = family.settings(settings)
    for key, allowed in (SUPPORTED | family.supported).items():
        value = _look_up(settings, key)
        if allowed is not None and value is not None and value not in allowed:
            shown = ", ".join(map(json.dumps, allowed)) or "null"
            raise UserError(
                f"{key}={json.dumps(value)} is not supported for {family.model_type}, only {shown}"
            )
    usual = family.write(TransformerConfig())
    for key, value in usual.items():
        # Token ids are no part of the model, and may be several.
        if settings.get(key) is not None and not key.endswith("_token_id"):
            _check_kind(key, settings[key], value)
    try:
        return family.read(settings)
    except (KeyError, TypeError, ValueError, ArithmeticError, UserError) as error:
        known = usual | family.defaults
        empty = [key for key in known if known[key] is not None and settings.get(key, 0) is None]
        hint = f" ({' and '.join(empty)}: null)" if empty else ""
        if isinstance(error, KeyError):
            missing = f"{error.args[0]!r}, which is not there" if error.args[0] else "what is null"
            error = f"{family.model_type} needs {missing}"
        raise UserError(f"{error}{hint}") from None


def _look_up(settings: dict[str, Any], key: str) -> Any:
    """The value of a key, dotted where it is nested; None where there is none."""
    value: Any = settings
    path = ""
    for step in key.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise UserError(f"{path}={json.dumps(value)}: should be an object or null")
        value, path = value.get(step), f"{path}.{step}".removeprefix(".")
    return value


def _check_kind(key: str, value: Any, usual: Any) -> None:
    """Raises UserError for a value of another kind than what we would write there."""
    if isinstance(usual, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(usual, int | float):
        # Whole numbers are sizes, unless we write 0 or less ourselves.
        lowest = min(usual, 1 if isinstance(usual, int) else 0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number and lowest <= value < math.inf
        wanted = f"a number, at least {lowest}"
    elif isinstance(usual, str):
        fits, wanted = isinstance(value, str), "text"
    else:
        return
    if not fits:
        raise UserError(f"{key}={json.dumps(value)}: should be {wanted}")
