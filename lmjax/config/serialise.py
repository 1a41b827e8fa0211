"""Configs as JSON and back, and the fingerprint that names a run.

An object of the class `AdamW` is `{"class": "AdamW", "weight_decay": 0.1}`, a tuple an array. Only
registered names are looked up: a run folder is data, and reading it runs no code that it names.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from lmjax.config import declare, values
from lmjax.config.errors import UserError
from lmjax.config.text import write
from lmjax.config.tree import join


def to_json(config: Any) -> str:
    """The config as indented JSON, which `from_json` turns into an equal one."""
    return json.dumps(_encode(config), indent=2, ensure_ascii=False) + "\n"


def fingerprint(config: Any) -> str:
    """12 hexadecimal digits that are equal for equal configs, on any machine."""
    text = json.dumps(_encode(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_text(config: Any) -> str:
    """The config as overrides, `path=value` a line: for people, for diffs, and for `parse`."""
    return "".join(f"{path}={text}\n" for path, text in _lines(config, type(config), ""))


def _lines(value: Any, kind: values.Type, path: str) -> Iterator[tuple[str, str]]:
    if path:
        yield path, write(value, kind)
    if values.is_config(value):
        for name, field in declare.fields(type(value)).items():
            yield from _lines(getattr(value, name), field.type, join(path, name))
    elif isinstance(value, tuple):
        for number, element in enumerate(value):
            if values.is_config(element):
                yield from _lines(element, type(element), join(path, str(number)))


def from_json(text: str) -> Any:
    """The config that `to_json` wrote.

    A field that the text lacks gets its default, so that older runs load after a field was added.

    Raises:
        UserError: not JSON, or a class or field that does not exist, or a value of the wrong
            type; the message says where in the text.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f'expected a JSON object with "class", got {text.strip()[:40]!r}')
    return _decode(data, "")


def _encode(value: Any) -> Any:
    if values.is_config(value):
        content = {name: _encode(getattr(value, name)) for name in declare.fields(type(value))}
        return {"class": values.name_of(type(value)), **content}
    if isinstance(value, tuple):
        return [_encode(element) for element in value]
    return value


def _decode(data: Any, path: str) -> Any:
    if isinstance(data, list):
        return tuple(
            _decode(element, join(path, str(number))) for number, element in enumerate(data)
        )
    if not isinstance(data, dict):
        return data
    where = path or "the top level"
    cls = _class(data, where)
    fields = declare.fields(cls)
    content = {}
    for name, element in data.items():
        if name == "class":
            continue
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(fields)}"
            raise UserError(f"at {where}: {data['class']} has no field {name!r}; {hint}")
        try:
            content[name] = values.conform(_decode(element, join(path, name)), fields[name].type)
        except TypeError as error:
            raise UserError(f"at {join(path, name)}: {error}") from None
    missing = [n for n, f in fields.items() if f.default is declare.MISSING and n not in content]
    if missing:
        raise UserError(f"at {where}: {data['class']} needs {', '.join(missing)}")
    try:
        return cls(**content)
    except UserError as error:
        raise UserError(f"at {where}: {error}" if path else str(error)) from error


def _class(data: dict[str, Any], where: str) -> type:
    """The registered class that a JSON object names."""
    name = data.get("class")
    if not isinstance(name, str):
        raise UserError(f'at {where}: expected an object with "class", got keys {list(data)}')
    if not isinstance(declare.registered().get(name), type):
        declare.import_all()
    found = declare.registered().get(name)
    if isinstance(found, type):
        return found
    known = [n for n, thing in declare.registered().items() if isinstance(thing, type)]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"near: {', '.join(near)}; " if near else ""
    raise UserError(
        f"at {where}: no config class is called {name!r}; {hint}one of your own is known once its "
        "module was imported: with imports=MODULE on the command line of lmjax.generation and "
        "lmjax.interop, with an import in the file of an experiment"
    )
