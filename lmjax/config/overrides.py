"""Settings from the command line put into a config: `model.num_layers=6 optimizer=Adafactor`.

The config is taken apart into a tree of `Node`s, walked from the root down: at each field the
override meant for it is applied, then the walk goes on into the new value. So a class or preset is
in place before the fields inside it are set, in whatever order they were typed.
"""

import re
from collections.abc import Sequence
from typing import Any

from lmjax.config import declare, suggestions, values
from lmjax.config.errors import UserError
from lmjax.config.text import Choice, Unfit, call_preset, read
from lmjax.config.tree import Node, join, take_apart

_PATH = re.compile(r"(\.\.\.)?\w+((\.|\.\.\.)\w+)*")


class Override:
    """One `path=text` of the command line; `...` in the path stands for any fields between."""

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.path, _, self.text = argument.partition("=")
        self.wildcard = "..." in self.path
        self.used = False
        pattern = re.escape(self.path).replace(r"\.\.\.", r"\.(?:.*\.)?")
        self._pattern = re.compile(pattern.removeprefix(r"\."))

    def matches(self, path: str) -> bool:
        """Returns whether it is meant for the field at `path`."""
        return self._pattern.fullmatch(path) is not None


def parse(config: Any, argv: Sequence[str], positional: str | Sequence[str] = ()) -> Any:
    """`config` with the settings of a command line applied.

    Args:
        config: the values to start from; any config.
        argv: `path=value` each, for instance `model.num_layers=6`. The value of a field that holds
            a config is the name of a class (fields that the old class has too keep their values)
            or a preset with its argument, `llama:7B` or `llama("7B")`. `...dtype=bfloat16` sets
            every field of that name; an exact path wins over it. `data.train.0.weight=2` reaches
            into a tuple, `1,2` gives a whole one, and the number after the last one appends.
        positional: the field, or the fields in order, that arguments without `=` are for.

    Raises:
        UserError: an unknown, repeated or misspelt setting, a value of the wrong type, or what
            the config's own `validate` says, with the path.
    """
    bare = [positional] if isinstance(positional, str) else list(positional)
    overrides = [_override(argument, bare) for argument in argv]
    seen: dict[str, Override] = {}
    for override in overrides:
        if override.path in seen:
            given = f"{seen[override.path].argument} and {override.argument}"
            raise UserError(f"{override.path} is set twice: {given}")
        seen[override.path] = override
    root = take_apart(config)
    _apply(root, "", overrides)
    unknown = [override for override in overrides if not override.used]
    if unknown:
        raise UserError("\n".join(suggestions.unknown(override.path, root) for override in unknown))
    return _build(root, "")


def _override(argument: str, bare: list[str]) -> Override:
    """Takes its name from `bare`, which keeps the last one, where the argument has none."""
    path, equals, text = argument.partition("=")
    if equals and _PATH.fullmatch(path):
        return Override(argument)
    if bare and not argument.startswith("-"):
        return Override(f"{bare.pop(0) if len(bare) > 1 else bare[0]}={argument}")
    name = path.lstrip("-").replace("-", "_")
    if _PATH.fullmatch(name) and path != name:
        raise UserError(
            f"settings are written without dashes: {name}={text or 'VALUE'}, not {argument}"
        )
    if _PATH.fullmatch(path):
        raise UserError(f"{argument!r} has no value; write {path}=VALUE")
    raise UserError(f"{argument!r} is not a setting; write NAME=VALUE, for instance steps=100")


def _apply(node: Node, path: str, overrides: list[Override]) -> None:
    """Applies what is meant for the fields of `node`, and what lies below them."""
    for name, field in declare.fields(node.cls).items():
        where = join(path, name)
        old = node.content.get(name, declare.MISSING)
        new = _apply_at(where, field.type, old, overrides)
        if new is not declare.MISSING:
            node.content[name] = new


def _apply_at(path: str, kind: values.Type, old: Any, overrides: list[Override]) -> Any:
    """The tree at `path` after the overrides meant for it and for what lies below."""
    matching = [o for o in overrides if o.path == path or (o.wildcard and o.matches(path))]
    # The exact path wins over wildcards, the longer wildcard over the shorter.
    matching.sort(key=lambda override: (not override.wildcard, len(override.path)))
    new = old
    for override in matching:
        override.used = True
    if matching:
        new = _value(path, matching[-1].text, kind, old)
    if isinstance(new, Node):
        _apply(new, path, overrides)
    elif isinstance(new, tuple):
        new = _apply_in_tuple(path, kind, new, overrides)
    return new


def _apply_in_tuple(
    path: str, kind: values.Type, old: tuple[Any, ...], overrides: list[Override]
) -> tuple[Any, ...]:
    new = list(old)
    # One more than there are: `data.train.2=TextFiles` appends a third.
    while any(override.path == f"{path}.{len(new)}" for override in overrides):
        new.append(declare.MISSING)
    kinds = values.element_types(kind, len(new))
    if kinds is None:  # a pair has no third element
        return old
    return tuple(
        _apply_at(f"{path}.{number}", part, element, overrides)
        for number, (element, part) in enumerate(zip(new, kinds, strict=True))
    )


def _value(path: str, text: str, kind: values.Type, old: Any) -> Any:
    """Value that `text` puts at `path`, where `old` was."""
    if not text and str not in values.members(kind):
        nothing = ", or () for none" if values.element_types(kind, 0) == () else ""
        raise UserError(f"{path}= has no value; expected {values.describe(kind)}{nothing}")
    try:
        return _expand(read(text, kind), old)
    except (Unfit, UserError) as error:
        raise UserError(f"{path}={text}: {error}") from None


def _expand(value: Any, old: Any) -> Any:
    """Classes and presets that were named, as nodes."""
    if isinstance(value, tuple):
        return tuple(_expand(element, None) for element in value)
    if not isinstance(value, Choice):
        return value
    if not isinstance(value.make, type):
        arguments = {name: _built(argument) for name, argument in value.arguments.items()}
        return take_apart(call_preset(value.name, value.make, arguments))
    shared = old.content if isinstance(old, Node) else {}
    content = {}
    for name, field in declare.fields(value.make).items():
        if name in value.arguments:
            content[name] = _expand(value.arguments[name], shared.get(name))
        elif name in shared and _fits(shared[name], field.type):
            content[name] = shared[name]
        elif field.default is not declare.MISSING:
            content[name] = take_apart(field.default)
    return Node(value.make, content)


def _built(value: Any) -> Any:
    return _build(_expand(value, None), "")


def _fits(value: Any, kind: values.Type) -> bool:
    """Returns whether a field of the old class can go into one of the new class."""
    if isinstance(value, Node):
        return any(values.is_config(m) and issubclass(value.cls, m) for m in values.members(kind))
    if isinstance(value, tuple):
        kinds = values.element_types(kind, len(value))
        return kinds is not None and all(map(_fits, value, kinds))
    try:
        values.conform(value, kind)
    except TypeError:
        return False
    return True


def _build(tree: Any, path: str) -> Any:
    """The config that a tree describes; what `validate` says gets the path in front."""
    if isinstance(tree, tuple):
        return tuple(_build(element, join(path, str(n))) for n, element in enumerate(tree))
    if not isinstance(tree, Node):
        return tree
    content = {name: _build(value, join(path, name)) for name, value in tree.content.items()}
    missing = [name for name in declare.fields(tree.cls) if name not in content]
    if missing:
        needed = " ".join(f"{join(path, name)}=VALUE" for name in missing)
        raise UserError(f"{path or 'this'} ({values.name_of(tree.cls)}) still needs {needed}")
    try:
        return tree.cls(**content)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from error
