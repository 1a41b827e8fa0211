"""Values as text on the command line and back: `1e3`, `1,2`, `none`, `llama:7B`, `AdamW`."""

import ast
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

from lmjax.config import declare, values
from lmjax.config.errors import UserError

_CALL = re.compile(r"(?P<name>[A-Za-z_]\w*)(?:\((?P<call>.*)\)|:(?P<argument>.*))?", re.DOTALL)
_STRING = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)
_PLAIN = re.compile(r"[\w./*+-]+(?: +[\w./*+-]+)*")  # what needs no quotes inside a tuple


class Unfit(Exception):
    """The text is not a value of the type; the message says what was expected."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A registered class or preset that was named, with the settings in its parentheses."""

    name: str
    make: Any  # the class or preset
    arguments: dict[str, Any]


def read(text: str, kind: values.Type, nested: bool = False) -> Any:
    """The value that `text` stands for in a field of type `kind`.

    A config comes back as a `Choice` (its other fields are the caller's business), in a tuple too.
    Inside tuples and parentheses (`nested`) strings may stand in quotes. Elsewhere quotes belong
    to the string, unless it needs them: 'none' beside none, or "\\n" for a line break.

    Raises:
        Unfit: `text` does not fit `kind`.
    """
    alternatives = values.members(kind)
    bare = _unquoted(text)
    if bare is not None and (nested or (str in alternatives and _needs_quotes(bare, kind))):
        text = bare
        alternatives = tuple(m for m in alternatives if m is str or _is_literal(m))
    reason = ""
    for member in sorted(alternatives, key=lambda member: member is str):  # a str takes anything
        if not values.is_config(member):
            try:
                return _read_one(text, member)
            except Unfit as error:
                reason = reason or str(error)
    if any(values.is_config(member) for member in alternatives):
        return _read_choice(text, kind)
    raise Unfit(reason or f"expected {_expected(kind)}, got {text!r}")


def _read_one(text: str, kind: values.Type) -> Any:
    if typing.get_origin(kind) is tuple:
        return _read_tuple(text, kind)
    if _is_literal(kind):
        for choice in typing.get_args(kind):
            if text == str(choice):
                return choice
    elif kind in (None, type(None)) and text.lower() == "none":
        return None
    elif kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif kind in (int, float):
        return _read_number(text, kind)
    elif kind is str:
        try:
            return values.conform(text, str)
        except TypeError as error:
            raise Unfit(str(error)) from None
    raise Unfit


def _read_number(text: str, kind: type) -> Any:
    try:
        try:
            return values.conform(kind(text), kind)
        except ValueError:
            number = float(text)  # 1e6 is a fine number of steps
            if kind is int and number.is_integer():
                return int(number)
    except (TypeError, ValueError):
        pass
    raise Unfit


def _read_tuple(text: str, kind: values.Type) -> tuple[Any, ...]:
    pieces = _split(_without_brackets(text.strip()))
    kinds = values.element_types(kind, len(pieces))
    if kinds is None:
        raise Unfit
    return tuple(read(piece, part, nested=True) for piece, part in zip(pieces, kinds, strict=True))


def _read_choice(text: str, kind: values.Type) -> Choice:
    match = _CALL.fullmatch(text.strip())
    if match is None or match["name"] not in declare.choices(kind):
        declare.import_all()
    found = declare.choices(kind)
    if match is None or match["name"] not in found:
        names = ", ".join(found) or "nothing (no class or preset of that kind is registered)"
        near = _near(text.strip() if match is None else match["name"], found)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise Unfit(f"expected {_expected(kind)}, got {text!r}; allowed here: {names}{hint}")
    pieces = [match["argument"]] if match["argument"] else _split(match["call"] or "")
    name = match["name"]
    return Choice(name, found[name], _arguments(name, found[name], pieces))


def _near(name: str, known: Iterable[str]) -> list[str]:
    """Names that are spelt alike, in letters of either case."""
    spelt = {one.lower(): one for one in known}
    return [spelt[one] for one in difflib.get_close_matches(name.lower(), spelt, cutoff=0.65)]


def _arguments(name: str, make: Any, pieces: list[str]) -> dict[str, Any]:
    """Reads `"7B", layers=4` by the types of a preset's parameters, or of a class's fields."""
    if isinstance(make, type):
        kinds = {field.name: field.type for field in declare.fields(make).values()}
        by_position = iter(())  # configs take their fields by name only
    else:
        hints = typing.get_type_hints(make)
        kinds = {key: hints.get(key, str) for key in inspect.signature(make).parameters}
        by_position = iter(kinds)
    arguments: dict[str, Any] = {}
    for piece in pieces:
        key, equals, text = (part.strip() for part in piece.partition("="))
        if not (equals and key.isidentifier()):
            key, text = next(by_position, ""), piece
        if key not in kinds:
            takes = ", ".join(f"{key}=" for key in kinds) or "nothing"
            before = next(reversed(arguments), None)
            if before is not None and values.element_types(kinds[before], 2) is not None:
                takes += f"; a tuple has parentheses of its own: {before}=(...)"
            raise Unfit(f"{piece!r} does not fit in {name}(...), which takes: {takes}")
        try:
            arguments[key] = read(text, kinds[key], nested=True)
        except Unfit as error:
            raise Unfit(f"{name}({key}=...): {error}") from None
    return arguments


def call_preset(name: str, make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The config that a preset returns for the arguments in its parentheses.

    Raises:
        UserError: an argument is missing, or the preset refuses its value.
    """
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{name}: {error}; write {name}:VALUE") from None
    return make(**arguments)


def write(value: Any, kind: values.Type, nested: bool = False) -> str:
    """The text that `read` turns into `value` again; of a config, only its name."""
    if values.is_config(value):
        return values.name_of(type(value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = not nested or _PLAIN.fullmatch(value)
        return value if plain and not _needs_quotes(value, kind, nested) else repr(value)
    if not isinstance(value, tuple):
        return repr(value)
    kinds = values.element_types(kind, len(value)) or ()
    pieces = [write(element, part, True) for element, part in zip(value, kinds, strict=True)]
    text = ",".join(pieces) + ("," if len(pieces) == 1 else "")
    return f"({text})" if nested or not value else text


def _needs_quotes(text: str, kind: values.Type, nested: bool = False) -> bool:
    """Returns whether bare `text` would be read as something else than the string it is."""
    try:
        return not text.isprintable() or read(text, kind, nested) != text
    except Unfit:
        return True


def _split(text: str) -> list[str]:
    """Splits at commas outside quotes and brackets; nothing after the last comma is no piece."""
    pieces, start, depth, position = [], 0, 0, 0
    while position < len(text):
        letter = text[position]
        string = _STRING.match(text, position)
        if string and text[:position].rstrip()[-1:] in "([=,":  # also where nothing stands before
            position = string.end()
            continue
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            pieces.append(text[start:position].strip())
            start = position + 1
        position += 1
    last = text[start:].strip()
    return [*pieces, last] if last else pieces


def _without_brackets(text: str) -> str:
    """`1, 2` from `(1, 2)`, but `(1, 2), (3, 4)` and `(1, 2),` as they are."""
    for left, right in ("()", "[]"):
        if text.startswith(left) and text.endswith(right) and len(_split(text)) == 1:
            return text[1:-1]
    return text


def _unquoted(text: str) -> str | None:
    """The string that a quoted literal stands for; None if `text` is not one."""
    return ast.literal_eval(text) if _STRING.fullmatch(text) and "\n" not in text else None


def _is_literal(kind: values.Type) -> bool:
    return typing.get_origin(kind) is Literal


def _expected(kind: values.Type) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    parts = []
    for member in values.members(kind):
        name = values.describe(member)
        if values.is_config(member):
            name = f"an {name}" if name[0] in "AEIOU" else f"a {name}"
        parts.append(words.get(member) or ("none" if name == "None" else name))
    return " or ".join(parts)
