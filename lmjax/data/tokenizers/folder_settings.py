"""Settings of tokens in the files beside a public vocabulary."""

import json
import pathlib
import re
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
MARK = re.compile(r"<.+>|\[.+\]")  # a name that looks like a special token's
SEVERAL = ("additional_special_tokens", "extra_special_tokens")


def folder_settings(folder: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json.

    As in transformers the latter's names count before the former's in older folders alone.
    """
    settings = read_json(folder / "tokenizer_config.json")
    names = read_json(folder / "special_tokens_map.json")
    return names | settings if "added_tokens_decoder" in settings else settings | names


def special_tokens(settings: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """The tokens that settings name for a role, as an end of text is, or call special.

    Returns:
      By name how texts match them, as far as that is said: those of `FLAGS`.
    """
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for several in SEVERAL:
        more = settings.get(several) or ()
        named += more.values() if isinstance(more, dict) else more
    named = [value for value in named if isinstance(value, (str, dict))]
    found = {token_name(value): _flags(value) for value in named}
    found.pop(padding_of_text(settings), None)
    return found


def _flags(entry: str | dict[str, Any]) -> dict[str, bool]:
    """Flags of how texts match a token, as far as settings give them."""
    return {} if isinstance(entry, str) else {flag: entry[flag] for flag in FLAGS if flag in entry}


def padding_of_text(settings: dict[str, Any]) -> str | None:
    """The token that some pad with for want of another, such as "!": a character of texts."""
    name = token_name(settings.get("pad_token"))
    return name if name is not None and len(name) == 1 else None


def added_tokens(folder: pathlib.Path) -> dict[str, Added]:
    """The tokens beside the vocabulary by name, in the order of the ids.

    Of those in added_tokens.json, which says no more, the settings name some as special. The others
    are text, such as runs of spaces or words of a trade, unless they look otherwise.
    """
    settings, names = folder_settings(folder), read_json(folder / "added_tokens.json")
    special = special_tokens(settings)
    added = {
        name: Added(token, name in special or bool(MARK.fullmatch(name)), {})
        for name, token in names.items()
    }
    for token, entry in settings.get("added_tokens_decoder", {}).items():
        name, text = entry["content"], entry["content"] == padding_of_text(settings)
        added[name] = Added(int(token), entry.get("special", True) and not text, _flags(entry))
    return dict(sorted(added.items(), key=lambda item: item[1].token))


def check_positions(where: pathlib.Path, size: int, new: dict[str, Added]) -> None:
    """Raises UserError unless the new tokens count on from the vocabulary's `size`."""
    for expected, (name, entry) in enumerate(new.items(), size):
        if entry.token != expected:
            raise UserError(
                f"{where}: the added token {name!r} has the id {entry.token}, but the next id is"
                f" {expected}"
            )


def lacks(folder: pathlib.Path, name: str) -> str:
    """Message about a folder whose tokens lie in a file that was not copied with the others."""
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
