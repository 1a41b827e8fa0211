"""Tools that a model may call: functions of the user's, and a cell of Python in a sandbox."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from lmjax.config import UserError
from lmjax.evaluation.tasks.sandbox import check_isolation, run_cell

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}
KINDS |= {dict: "object"}
LONGEST = 8000  # characters of a result


class ToolError(Exception):
    """A tool could not do what it was called for; the model is told why."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
      name: by which it is called.
      description: for the model.
      parameters: JSON schema of its arguments.
      call: takes the arguments by name, and returns text or a JSON value.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[..., Any]

    @property
    def openai(self) -> dict[str, Any]:
        """The tool as a request to OpenAI's interface describes it."""
        described = {"name": self.name, "description": self.description}
        return {"type": "function", "function": described | {"parameters": dict(self.parameters)}}

    def result(self, arguments: Any) -> str:
        """The tool's value as text, or what went wrong in it."""
        try:
            value = self.call(**_checked(arguments, self.parameters))
        except Exception as error:  # of the user's function, whatever it is
            return f"{type(error).__name__}: {error}"[:LONGEST]
        text = value
        if not isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False, default=str)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"


def tool_of(function: Callable[..., Any]) -> Tool:
    """The tool that a function is: its docstring and its parameters' types describe it.

    Raises:
      UserError: it has no docstring, or a parameter without a type that JSON has.
    """
    name = function.__name__
    if not (text := inspect.getdoc(function)):
        raise UserError(f"the tool {name} has no docstring, which tells a model what it is for")
    kinds, properties, required = typing.get_type_hints(function), {}, []
    for parameter in inspect.signature(function).parameters.values():
        where = f"the tool {name}: parameter {parameter.name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{where}: only parameters with names can be called")
        properties[parameter.name] = _schema(kinds.get(parameter.name), where)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required}
    return Tool(name, text, schema, function)


def python_tool(allow_network: bool = False) -> Tool:
    """A cell of Python that keeps what earlier cells defined; see `run_cell` for its limits.

    Args:
      allow_network: see `run_cell`.

    Raises:
      UserError: its network cannot be taken away.
    """
    check_isolation(allow_network)
    before: list[str] = []

    def python(code: str) -> str:
        ended, said = run_cell(code, before, allow_network=allow_network)
        if not ended:
            raise ToolError(said)
        before.append(code)
        return said or "(no output)"

    words = "Runs Python, and returns what it prints and the value of its last expression."
    schema = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
    return Tool("python", words, schema, python)


def _checked(arguments: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the names that there are. ToolError: others, or some are missing."""
    if not isinstance(arguments, Mapping):
        raise ToolError("the arguments are no JSON object")
    known = schema["properties"]
    if wrong := [name for name in arguments if name not in known]:
        raise ToolError(f"there is no argument {wrong[0]!r}, only {', '.join(known)}")
    if missing := [name for name in schema["required"] if name not in arguments]:
        raise ToolError(f"the argument {missing[0]!r} is missing")
    return dict(arguments)


def _schema(kind: Any, where: str) -> dict[str, Any]:
    """JSON schema of a parameter's type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return {"enum": list(parts)}
    if origin in (typing.Union, types.UnionType) and type(None) in parts and len(parts) == 2:
        (inner,) = (part for part in parts if part is not type(None))
        return {"anyOf": [_schema(inner, where), {"type": "null"}]}
    if origin is list and parts:
        return {"type": "array", "items": _schema(parts[0], where)}
    plain = origin or kind
    if plain not in KINDS:
        known = ", ".join(one.__name__ for one in KINDS)
        raise UserError(f"{where}: its type must be one of {known}, a Literal, or None with one")
    return {"type": KINDS[plain]}
