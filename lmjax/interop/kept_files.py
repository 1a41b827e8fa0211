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
from typing import Any, NamedTuple

from lmjax.config import UserError
from lmjax.data.tokenizers.classes import PROGRAMS, Program, tokenizer_class
from lmjax.data.tokenizers.folder_settings import read_json, token_name
from lmjax.interop.tensor_files import write_json
from lmjax.runs.folder import GENERATION_FILE, MAP_FILE, TEMPLATE_FILE, TEMPLATE_FOLDER

KEPT = (TEMPLATE_FILE, TEMPLATE_FOLDER, GENERATION_FILE, MAP_FILE)
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates that transformers takes by itself
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # that every tokenizer knows
# What generation_config.json has, besides roles of tokens, that changes no text.
UNTOLD = ("do_sample", "transformers_version", "_from_model_config", "use_cache", "max_length")
DRAWN = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff")


class Template(NamedTuple):
    """A chat template in Jinja's language, and the file of the folder that it stands in."""

    source: str
    file: str


def read_templates(folder: Path) -> dict[str, Template]:
    """The chat templates of a folder by name, as transformers looks for them; empty: it has none.

    Files of their own come before tokenizer_config.json, and that before chat_template.json, in
    which older programs that read pictures too keep theirs.

    Raises:
      UserError: a file is damaged, or its chat_template is neither text nor a list of named ones.
    """
    files = {DEFAULT: folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    found = {name: path for name, path in files.items() if path.is_file()}
    if found:
        return {
            name: Template(_text(path), str(path.relative_to(folder)))
            for name, path in found.items()
        }
    for file in ("tokenizer_config.json", "chat_template.json"):
        given = read_json(folder / file).get("chat_template")
        if given is not None:
            return {name: Template(text, file) for name, text in _named(folder / file, given)}
    return {}


def _named(path: Path, given: Any) -> list[tuple[str, str]]:
    """Names and texts of what a file has as chat_template."""
    if isinstance(given, str):
        return [(DEFAULT, given)]
    try:
        pairs = given.items() if isinstance(given, dict) else None
        named = list(pairs or [(entry["name"], entry["template"]) for entry in given])
    except (KeyError, TypeError):
        named = []
    if not named or not all(isinstance(part, str) for pair in named for part in pair):
        raise UserError(
            f'{path}: chat_template should be text, or a list of {{"name": ..., "template": ...}}'
        )
    return named


def read_special_names(folder: Path) -> dict[str, str | None]:
    """The special tokens by the names that templates know them under, such as eos_token.

    None where the folder says that there is none; nothing where neither it nor its tokenizer's
    class says.
    """
    roles = PROGRAMS.get(tokenizer_class(folder), Program()).roles
    usual = {f"{role}_token": name for role, name in roles.items()}
    settings = usual | read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # as transformers: it counts in older folders alone
        settings |= read_json(folder / MAP_FILE)
    names = [f"{role}_token" for role in ROLES]
    found = {name: token_name(settings[name]) for name in names if name in settings}
    extra = settings.get("extra_special_tokens")
    others = {**settings, **extra} if isinstance(extra, dict) else settings
    others = {k: v for k, v in others.items() if k.endswith("_token") and isinstance(v, str)}
    return others | found


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

    Args:
      source: either kind of folder.
      folder: where to write.
      usual: what generation_config.json says where the source has nothing of it.

    Returns:
      What generation_config.json holds.
    """
    templates = read_templates(source)
    write_templates(folder, templates)
    if templates and (names := read_special_names(source)):
        write_json(folder / MAP_FILE, names)
    if settings := {**usual, **read_generation_config(source)}:
        write_json(folder / GENERATION_FILE, settings)
    return settings


def write_templates(folder: Path, templates: Mapping[str, Template]) -> None:
    """Writes chat templates as transformers does: the usual one, and others in a folder."""
    for name, template in templates.items():
        if name == DEFAULT:
            path = folder / TEMPLATE_FILE
        elif name and name == Path(name).name:
            path = folder / TEMPLATE_FOLDER / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        else:
            raise UserError(f"the chat template {name!r} in {template.file} has no name for a file")
        path.write_text(template.source, "utf-8", newline="")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # with its line ends
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
