"""Messages about a setting that does not exist: similar names, or the path it belongs to."""

import difflib

from lmjax.config import declare, values
from lmjax.config.tree import Node, join, type_at, walk


def unknown(path: str, root: Node) -> str:
    """The message for a setting at `path` (or a wildcard) that nothing in `root` took."""
    known = dict(walk(root))
    if "..." in path:
        names = {setting.rpartition(".")[2] for setting in known}
        near = difflib.get_close_matches(path.rpartition(".")[2], names)
        hint = f"; did you mean {' or '.join('...' + name for name in near)}?" if near else ""
        return f"{path} matches no setting{hint}"
    # The longest part of the path that exists often tells why the rest does not.
    parent, _, name = path.rpartition(".")
    while parent and parent not in known:
        parent, _, name = parent.rpartition(".")
    holder = known[parent] if parent else root
    message = f"there is no setting {path}"
    if holder is None:
        declare.import_all()
        names = list(declare.choices(type_at(root, parent))) or ["NAME"]
        return f"{message}: {parent} is none; add {' or '.join(f'{parent}={n}' for n in names)}"
    if isinstance(holder, tuple):
        last = len(holder) - 1
        numbers = f"goes from 0 to {last}" if holder else "is empty"
        return f"{message}: {parent} {numbers}; {parent}.{last + 1}=NAME adds one"
    if not isinstance(holder, Node):
        return f"{message}: {parent} is a plain value, {holder!r}"
    owners = _owners(parent, name, root) if parent else []
    if owners:
        return f"{message}: {name} belongs to {' and '.join(owners)}; add {parent}={owners[0]}"
    near = _near(path, join(parent, name), list(known))
    if near:
        return f"{message}; did you mean {' or '.join(near)}?"
    if not parent:
        return f"{message}; --help lists all"
    fields = ", ".join(declare.fields(holder.cls)) or "no settings"
    return f"{message}; {parent} ({values.name_of(holder.cls)}) has: {fields}"


def _near(path: str, wrong: str, known: list[str]) -> list[str]:
    """Up to four existing paths: those that end in the same name, or those spelt alike."""
    name = path.rpartition(".")[2]
    same = [setting for setting in known if setting.rpartition(".")[2] == name]
    if same:
        return sorted(
            same, key=lambda setting: -difflib.SequenceMatcher(a=setting, b=path).ratio()
        )[:4]
    alike = difflib.get_close_matches(wrong, known, cutoff=0.75)
    names = {setting.rpartition(".")[2] for setting in known}
    for close in difflib.get_close_matches(name, names, n=2, cutoff=0.7):
        alike += [setting for setting in known if setting.rpartition(".")[2] == close]
    return list(dict.fromkeys(alike))[:4]


def _owners(path: str, name: str, root: Node) -> list[str]:
    """Other classes that could stand at `path` and have a field `name`."""
    declare.import_all()
    found = declare.choices(type_at(root, path))
    return [n for n, cls in found.items() if isinstance(cls, type) and name in declare.fields(cls)]
