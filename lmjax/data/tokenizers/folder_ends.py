"""Tokens that a public folder's own program puts before and after a text."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lmjax.config import UserError
from lmjax.data.tokenizers.base import SEPARATOR, Ends
from lmjax.data.tokenizers.classes import PROGRAMS, Program
from lmjax.data.tokenizers.folder_settings import (
    GLM_ENDS,
    folder_settings,
    lacks,
    read_json,
    token_name,
)

USUAL_ENDS = (SEPARATOR, "</s>", "[SEP]", "<eos>")  # of a document, where nothing says it


class Frame(NamedTuple):
    """Ids that a program puts before and behind a text."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]


def template(post_processor: Any | None) -> Frame | None:
    """Template of a post-processor of the tokenizers library for one text; None: there is none.

    Raises:
      UserError: a kind that is not known.
    """
    if post_processor is None:
        return None
    return _template(json.loads(post_processor.__getstate__()))


def _template(state: dict[str, Any]) -> Frame:
    kind = state["type"]
    if kind == "ByteLevel":  # it moves offsets and adds nothing
        return Frame((), ())
    if kind in ("BertProcessing", "RobertaProcessing"):
        return Frame((state["cls"][1],), (state["sep"][1],))
    if kind == "Sequence":
        opening, closing = (), ()
        for part in map(_template, state["processors"]):
            opening, closing = (*part.opening, *opening), (*closing, *part.closing)
        return Frame(opening, closing)
    if kind != "TemplateProcessing":
        raise UserError(f"a tokenizer with the post-processor {kind} is not supported")
    ids: list[tuple[int, ...]] = [(), ()]
    behind = 0
    for piece in state["single"]:
        if "Sequence" in piece:
            behind = 1
        else:
            name = piece["SpecialToken"]["id"]
            ids[behind] += tuple(state["special_tokens"][name]["ids"])
    return Frame(*ids)


def folder_ends(
    folder: pathlib.Path,
    kind: str | None,
    find: Callable[[str], int | None],
    frame: Frame | None = None,
    own: Mapping[str, str | None] = MappingProxyType({}),
) -> tuple[Frame, Ends]:
    """Tokens that a program puts around a text, and those around a document of ours.

    A document is closed by what ends one even where the program leaves that to others.

    add_bos_token and add_eos_token decide where the folder says them, then the post-processor of
    tokenizer.json, then what the class does by default.

    Args:
      folder: the model's folder.
      kind: its tokenizer's class, if that is known.
      find: the id of a token by name, or None.
      frame: of tokenizer.json's post-processor; None where there is none.
      own: names by role that the vocabulary's file says, where tokenizer_config.json does not.

    Raises:
      UserError: a token that is named is none, or nothing says what ends a document.
    """
    settings = folder_settings(folder)
    if names := GLM_ENDS.get(kind):
        found = tuple(find(name) for name in names)
        if None in found:
            raise UserError(lacks(folder, names[found.index(None)]))
        frame = Frame(found[:1], found[1:])
        return frame, Ends(*frame, found[1])
    program = PROGRAMS.get(kind, Program())
    role = _Roles(folder, settings, {**program.roles, **own}, find)
    if frame is None:
        frame = Frame(role.all(program.before), role.all(program.behind))
    opening, closing = frame
    if (said := settings.get("add_bos_token")) is not None:
        opening = (opening or role.all(["bos"])) if said else ()
    if (said := settings.get("add_eos_token")) is not None:
        closing = (closing or role.all(["eos"])) if said else ()
    end = closing[0] if closing else role.end()
    behind = closing or (() if opening == (end,) else (end,))
    return Frame(opening, closing), Ends(opening, behind, end)


class _Roles:
    """Ids of special tokens by role."""

    def __init__(self, folder: pathlib.Path, settings: dict, names: Mapping, find: Callable):
        """`names` are those of roles that the settings do not speak of."""
        self._folder, self._settings, self._names, self._find = folder, settings, names, find

    def all(self, roles: Iterable[str]) -> tuple[int, ...]:
        """Their ids, less roles that no token has. UserError for a name that is no token."""
        return tuple(token for role in roles if (token := self._one(role)) is not None)

    def _one(self, role: str) -> int | None:
        key = f"{role}_token"
        if key not in self._settings:
            name = self._names.get(role)
            return None if name is None else self._find(name)
        name = token_name(self._settings[key])
        token = None if name is None else self._find(name)
        if name is not None and token is None:
            raise UserError(f"{self._folder}: its {key} {name!r} is no token")
        return token

    def end(self) -> int:
        """The id that ends a document where none is put behind a text."""
        if found := self.all(("eos", "sep")):
            return found[0]
        for file in ("generation_config.json", "config.json"):
            said = read_json(self._folder / file).get("eos_token_id")
            said = said[0] if isinstance(said, list) and said else said
            if isinstance(said, int):
                return said
        for name in USUAL_ENDS:
            if (token := self._find(name)) is not None:
                return token
        raise UserError(
            f"{self._folder}: which token ends a document is not said in tokenizer_config.json"
        )
