"""A config taken apart, so that parts of it can be exchanged before it is built again."""

from collections.abc import Iterator
from typing import Any

from lmjax.config import declare, values


class Node:
    """A config taken apart: its class, and its fields as nodes, tuples of nodes, or plain values.

    A field that has no default and was not given is absent from `content`.
    """

    def __init__(self, cls: type, content: dict[str, Any]) -> None:
        self.cls = cls
        self.content = content


def take_apart(value: Any) -> Any:
    """A config as a tree of nodes; other values as they are."""
    if values.is_config(value):
        names = declare.fields(type(value))
        return Node(type(value), {name: take_apart(getattr(value, name)) for name in names})
    if isinstance(value, tuple):
        return tuple(take_apart(element) for element in value)
    return value


def join(path: str, name: str) -> str:
    """`name` below `path`; the root's path is empty."""
    return f"{path}.{name}" if path else name


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every path below `tree` with what stands there; None where a value is still missing."""
    children: list[tuple[str, Any]] = []
    if isinstance(tree, Node):
        children = [(name, tree.content.get(name)) for name in declare.fields(tree.cls)]
    elif isinstance(tree, tuple):
        children = [(str(number), element) for number, element in enumerate(tree)]
    for name, child in children:
        yield join(path, name), child
        yield from walk(child, join(path, name))


def type_at(root: Node, path: str) -> values.Type:
    """The type of the field or tuple element at `path`, which exists."""
    kind: values.Type = root.cls
    tree: Any = root
    for part in path.split("."):
        if isinstance(tree, Node):
            kind, tree = declare.fields(tree.cls)[part].type, tree.content.get(part)
        else:
            kinds = values.element_types(kind, len(tree)) or ()
            kind, tree = kinds[int(part)], tree[int(part)]
    return kind
