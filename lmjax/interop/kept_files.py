"""Files of public folders beside weights and tokenizer that a run folder keeps.

Chat templates, the ids that end a text, and the names of the special tokens that templates write.
A run folder that was converted has them in Hugging Face's own files and formats, beside its
config.json, so they come out again as they went in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lmjax.config import UserError
from lmjax.data.chat.folder import (
    MAP_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    read_special_names,
    read_templates,
    write_templates,
)
from lmjax.data.tokenizers.folder_settings import read_json
from lmjax.interop.tensor_files import write_json
from lmjax.runs.folder import GENERATION_FILE

KEPT = (TEMPLATE_FILE, TEMPLATE_FOLDER, GENERATION_FILE, MAP_FILE)
# What generation_config.json has, besides roles of tokens, that changes no text.
UNTOLD = ("do_sample", "transformers_version", "_from_model_config", "use_cache", "max_length")
DRAWN = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff")


def read_end_ids(folder: Path) -> list[int]:
    """The ids that end a text by the folder's generation_config.json and config.json.

    Raises:
      UserError: an eos_token_id that is neither an id nor a list of ids.
    """
    files = (GENERATION_FILE, "config.json")
    return list(dict.fromkeys(token for file in files for token in _end_ids(folder / file)))


def _end_ids(path: Path) -> list[int]:
    given = read_json(path).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token) is int for token in ids):
        raise UserError(
            f"{path}: eos_token_id={json.dumps(given)}: should be the id of a token, or a list of"
            " such"
        )
    return ids


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, with the ends that config.json alone names; empty: no such thing."""
    settings = read_json(folder / GENERATION_FILE)
    ends = read_end_ids(folder)
    if set(ends) != set(_end_ids(folder / GENERATION_FILE)):
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return settings


def read_recommended(folder: Path) -> dict[str, Any]:
    """Sampling settings of generation_config.json that differ from the defaults."""
    settings = read_json(folder / GENERATION_FILE)
    unused = UNTOLD if settings.get("do_sample") else (*UNTOLD, *DRAWN)
    roles = {key for key in settings if re.fullmatch(r"(?!forced).*_token_id", key)}
    usual = (None, False, 0, 1, [])
    return {k: v for k, v in settings.items() if k not in (*unused, *roles) and v not in usual}


def keep(
    source: Path, folder: Path, usual: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Writes into `folder` what a model folder or a run folder says, in the files of `KEPT`.

    Chat templates that are in `folder` already are left as they are.

    Args:
      source: either kind of folder.
      folder: where to write.
      usual: what generation_config.json says where the source has nothing of it.

    Returns:
      What generation_config.json holds.
    """
    templates = read_templates(source)
    if not read_templates(folder):
        write_templates(folder, templates)
    if templates and (names := read_special_names(source)):
        write_json(folder / MAP_FILE, names)
    if settings := {**usual, **read_generation_config(source)}:
        write_json(folder / GENERATION_FILE, settings)
    return settings
