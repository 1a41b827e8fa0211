"""Chat templates of model folders, and the names of special tokens that they write."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.config import UserError, config
from lmjax.data.chat.jinja_format import JinjaFormat
from lmjax.data.chat.messages import ChatFormat, Message, RenderedPiece
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import TextPiece, Tokenizer
from lmjax.data.tokenizers.classes import PROGRAMS, Program, tokenizer_class
from lmjax.data.tokenizers.folder_settings import read_json, token_name
from lmjax.remote import check_path, local_copy

TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
MAP_FILE = "special_tokens_map.json"
TOKENIZER = "tokenizer"  # folder in a run's folder; a public model's has the files beside others
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates that transformers takes by itself
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # that every tokenizer knows


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


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # with its line ends
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


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


def folder_format(
    folder: Path, tokenizer: Tokenizer, name: str | None = None
) -> JinjaFormat | None:
    """Chat format that a folder spells out; None where it has no template of that name.

    Args:
      folder: a run folder or a public model's, on this machine.
      tokenizer: the folder's.
      name: of the template; None: the usual one, and that of the folder for conversations with
        tools where it has one.

    Raises:
      UserError: a damaged file, or a template that is none.
    """
    templates = read_templates(folder)
    if (name or DEFAULT) not in templates:
        return None
    with_tools = templates.get(TOOL_USE) if name is None else None
    template, special = templates[name or DEFAULT], tokenizer.special
    names = {token: name for name, token in special.items()}
    tokens = {"bos_token": names.get(tokenizer.begin), "eos_token": names.get(tokenizer.end)}
    tokens |= read_special_names(folder)
    return JinjaFormat(
        source=template.source,
        title=f"{template.file} of the folder",
        special=frozenset(special),
        tokens={role: token for role, token in tokens.items() if token is not None},
        with_tools=None if with_tools is None else with_tools.source,
    )


@config
class FolderTemplate(ChatFormat):
    """The chat template of a public model's folder, or of a run that began with one."""

    path: str  # the folder, with its tokenizer; or a URL
    name: str | None = None  # of its template, where it has several; None: the usual one

    def validate(self) -> None:
        """Raises UserError for a URL that cannot be served."""
        check_path(self.path, "path")

    @property
    def title(self) -> str:
        """See `ChatFormat`."""
        return self._format.title

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """See `ChatFormat`."""
        return self._format.stop_strings

    def render(self, messages: Sequence[Message], reply: bool = True) -> list[TextPiece]:
        """See `ChatFormat.render`."""
        return self._format.render(messages, reply)

    def render_replies(self, messages: Sequence[Message]) -> list[RenderedPiece]:
        """See `ChatFormat.render_replies`."""
        return self._format.render_replies(messages)

    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """See `ChatFormat.stop_tokens`."""
        return self._format.stop_tokens(tokenizer)

    def identity(self) -> tuple[str, ...]:
        """Texts that change when its texts change."""
        found = self._format
        names = [f"{role} {token}" for role, token in sorted(found.tokens.items())]
        return (found.source, found.with_tools or "", *sorted(found.special), *names)

    def _tokens(self, tokenizer: Tokenizer, pieces: Sequence[TextPiece]) -> list[int]:
        return self._format._tokens(tokenizer, pieces)

    @property
    def _format(self) -> JinjaFormat:
        return _read_format(self.path, self.name)


@functools.cache
def _read_format(path: str, name: str | None) -> JinjaFormat:
    """The format of a folder, read once.

    Raises:
      UserError: there is none of that name.
    """
    folder = local_copy(path, "path")
    inner = folder / TOKENIZER
    found = folder_format(folder, read_tokenizer(inner if inner.is_dir() else folder), name)
    if found is None:
        known = ", ".join(read_templates(folder)) or "none"
        raise UserError(
            f"template: {path} has no chat template {name!r} (it has {known}); name one of ours,"
            " as template='chat_template(\"chatml\")'"
        )
    return found
