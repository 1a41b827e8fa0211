"""Nested values as YAML."""

import json
import re
from typing import Any

# What YAML, in any of its versions, takes for a string without quotes.
PLAIN = re.compile(r"[A-Za-z/][\w./@-]*")
NO_STRINGS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}


def yaml_text(value: dict[str, Any]) -> str:
    """A dictionary of dictionaries, lists, strings, numbers and truth values as YAML."""
    return "".join(line + "\n" for line in _lines(value))


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [
            line for name, inner in value.items() for line in _entry(f"{_scalar(name)}:", inner)
        ]
    if isinstance(value, list | tuple) and value:
        return [line for inner in value for line in _item(_lines(inner))]
    return [_scalar(value)]


def _entry(head: str, value: Any) -> list[str]:
    if isinstance(value, dict | list | tuple) and value:
        return [head, *(f"  {line}" for line in _lines(value))]
    return [f"{head} {_scalar(value)}"]


def _item(lines: list[str]) -> list[str]:
    first, *rest = lines
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _scalar(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NO_STRINGS:
        return value
    return json.dumps(value)  # which is YAML too
