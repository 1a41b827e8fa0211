"""Text of `--help`: how to change settings, and all of them as a tree."""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lmjax.config import declare, values
from lmjax.config.text import write
from lmjax.config.tree import join

_LEFT = 46  # columns for `name: type = value`; what is longer pushes its comment to the next line


class _Line(NamedTuple):
    path: str
    kind: values.Type
    value: Any
    changed: bool  # differs from the default of the class it stands in
    doc: str


def help_text(
    experiment: Any,
    name: str,
    description: str | None = None,
    positional: str | Sequence[str] = (),
    width: int = 100,
) -> str:
    """The help of a command whose settings are the config `experiment`.

    Args:
        experiment: the config with its values.
        name: what to type to run it, for instance `python -m experiments.quickstart`.
        description: what it is for; the experiment file's docstring.
        positional: the setting, or the settings in order, for arguments without `=`.
        width: columns.
    """
    declare.import_all()  # so that the choices are complete
    lines = list(_lines(experiment, ""))
    parts = [inspect.cleandoc(description)] if description else []
    bare = [positional] if isinstance(positional, str) else positional
    first = "".join(f" [{name.upper()}]" for name in bare)
    parts.append(f"Usage: {name}{first} [SETTING=VALUE ...]")
    parts.append(_how_to(lines, hasattr(experiment, "explain")))
    title = f"Settings of {values.name_of(type(experiment))}"
    parts.append(f"{title} (* = chosen here, not the default of its class):")
    parts.append("\n".join(row for line in lines for row in _rows(line, width)))
    return "\n\n".join(parts) + "\n"


def _lines(config: Any, path: str) -> Iterator[_Line]:
    for name, field in declare.fields(type(config)).items():
        value = getattr(config, name)
        where = join(path, name)
        yield _Line(where, field.type, value, field.default != value, field.doc)
        if values.is_config(value):
            yield from _lines(value, where)
        elif isinstance(value, tuple):
            kinds = values.element_types(field.type, len(value)) or ()
            for number, (element, kind) in enumerate(zip(value, kinds, strict=True)):
                if values.is_config(element):
                    yield _Line(join(where, str(number)), kind, element, False, "")
                    yield from _lines(element, join(where, str(number)))


def _rows(line: _Line, width: int) -> Iterator[str]:
    """`name: type = value *    comment`, the comment wrapped into the right-hand column."""
    depth = line.path.count(".")
    text = write(line.value, line.kind)
    if any(values.is_config(element) for element in _elements(line.value)):
        text = f"{len(line.value)} of them"  # each has lines of its own below
    left = "  " * (depth + 1) + f"{line.path.rpartition('.')[2]}{_kind(line)} = {text}"
    left += " *" if line.changed else ""
    doc = line.doc
    if values.is_config(line.value):
        doc = doc or (inspect.getdoc(type(line.value)) or "").partition("\n")[0]
    others = [
        _usage(choice, make)
        for choice, make in declare.choices(line.kind).items()
        if choice != text
    ]
    if others:
        doc = f"{doc} [or {', '.join(others)}]".strip()
    right = textwrap.wrap(doc, max(width - _LEFT - 2, 20)) or [""]
    if len(left) > _LEFT and doc:
        yield from textwrap.wrap(left, width, subsequent_indent="  " * (depth + 3))
        left = ""
    for number, row in enumerate(right):
        yield f"{left if number == 0 else '':{_LEFT}}  {row}".rstrip()


def _usage(name: str, make: Callable[..., Any]) -> str:
    """`AdamW` of a class, `llama:SIZE` of a preset that needs an argument."""
    needed = [
        key.upper()
        for key, parameter in inspect.signature(make).parameters.items()
        if parameter.default is inspect.Parameter.empty and not isinstance(make, type)
    ]
    return f"{name}:{','.join(needed)}" if needed else name


def _kind(line: _Line) -> str:
    """The type in words; of a config nothing, since its class stands beside it."""
    if values.is_config(line.value):
        return ""
    return ": " + values.describe(line.kind).replace("None", "none")


def _elements(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def _how_to(lines: list[_Line], explained: bool) -> str:
    """Examples with settings that this experiment has."""
    examples = []
    numbers = [line for line in lines if type(line.value) is int]
    if numbers:
        examples.append((f"{numbers[0].path}={numbers[0].value * 2}", "one value"))
    nested = [line for line in numbers if "." in line.path]
    if nested:
        examples.append((f"{nested[-1].path}={nested[-1].value}", "names joined with dots"))
    for line in lines:
        own = write(line.value, line.kind)
        others = [
            name
            for name, thing in declare.choices(line.kind).items()
            if name != own and isinstance(thing, type)
        ]
        if values.is_config(line.value) and others:
            what = "another class; what both have is kept"
            examples.append((f"{line.path}={others[0]}", what))
            break
    names = [line.path.rpartition(".")[2] for line in lines if "." in line.path]
    repeated = [name for name in names if names.count(name) > 1 and not name.isdigit()]
    if repeated:
        value = next(line for line in lines if line.path.endswith(f".{repeated[0]}"))
        text = write(value.value, value.kind)
        examples.append((f"...{repeated[0]}={text}", "every setting of that name"))
    if explained:
        examples.append(("explain=true", "print the layers of the model, and end"))
    rows = [f"  {example:{_LEFT - 2}}  {what}" for example, what in examples]
    return "\n".join(["For instance:", *rows])
