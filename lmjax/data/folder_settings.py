"""What the files beside a public vocabulary say about its tokens."""

import json
import pathlib
from typing import Any, NamedTuple

from lmjax.config import UserError


class Added(NamedTuple):
    """A token beside the vocabulary: its id, whether it stands for no text, how texts match it."""

    token: int
    special: bool
    flags: dict[str, bool]  # single_word, lstrip, rstrip, normalized


# What GLM's programs put before and behind a text; their folders name roles, not that.
GLM_ENDS = {
    "GLMGPT2Tokenizer": ("[CLS]", "<|endoftext|>"),
    "GLMChineseTokenizer": ("[CLS]", "<|endoftext|>"),
    "GLMBertTokenizer": ("[CLS]", "[SEP]"),
    "GLMRobertaTokenizer": ("<s>", "</s>"),
}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def folder_settings(folder: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json under it."""
    return read_json(folder / "special_tokens_map.json") | read_json(
        folder / "tokenizer_config.json"
    )


def added_tokens(folder: pathlib.Path) -> dict[str, Added]:
    """The tokens beside the vocabulary by name, in the order of the ids."""
    names = read_json(folder / "added_tokens.json")
    added = {name: Added(token, True, {}) for name, token in names.items()}
    for token, entry in folder_settings(folder).get("added_tokens_decoder", {}).items():
        flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
        added[entry["content"]] = Added(int(token), entry.get("special", True), flags)
    return dict(sorted(added.items(), key=lambda item: item[1].token))


def check_places(where: pathlib.Path, size: int, new: dict[str, Added]) -> None:
    """Raises UserError unless the new tokens count on from the vocabulary's `size`."""
    for place, (name, entry) in enumerate(new.items(), size):
        if entry.token != place:
            raise UserError(
                f"{where}: the added token {name!r} has the id {entry.token}, but the next id is"
                f" {place}"
            )


def lacks(folder: pathlib.Path, name: str) -> str:
    """What to say of a folder whose tokens lie in a file that was not copied with the others."""
    return (
        f"{folder}: the tokenizer lacks the token {name!r}; the published folder names it, with"
        " others, in added_tokens.json: put that file there too"
    )


def token_name(entry: Any) -> str | None:
    """A special token as settings write it: its name, or an object that holds the name."""
    return entry["content"] if isinstance(entry, dict) else entry


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file. UserError where it is damaged."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 file. UserError where it is missing."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


def library(name: str) -> Any:
    """An optional package, with the modules of it that we use. UserError where it is missing."""
    try:
        return __import__(name)
    except ImportError:
        raise UserError(
            f"this tokenizer needs the package {name}: pip install 'lmjax[tokenizers]'"
        ) from None
