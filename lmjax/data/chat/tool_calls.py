"""ChatGLM3's tool calls: a line of Python behind the tool's name."""

from __future__ import annotations

import ast
import json
import keyword
from typing import Any

from lmjax.config import UserError
from lmjax.data.chat.messages import Message, ToolCall

FENCE = "```"
INTERPRETER = "interpreter"  # the metadata of ChatGLM3's messages that hold a program


def write_tool_call(call: ToolCall) -> Message:
    """A tool call as ChatGLM3's assistant writes it: a line of Python behind the tool's name.

    Raises:
      UserError: an argument's name is no name in Python.
    """
    for name in call.arguments:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(f"tool {call.name}: an argument cannot be called {name!r}")
    arguments = ", ".join(f"{name}={_literal(value)}" for name, value in call.arguments.items())
    program = f"{FENCE}python\ntool_call({arguments})\n{FENCE}"
    return Message("assistant", program, metadata=call.name)


def read_tool_call(message: Message) -> ToolCall | None:
    """The tool call that an assistant's message is; None for an answer or a program to run.

    The text is parsed and never run.

    Raises:
      ValueError: the model wrote no call with values by name.
    """
    if message.role != "assistant" or message.metadata in ("", INTERPRETER):
        return None
    lines = [line for line in message.content.split("\n") if line.strip()[:3] != FENCE]
    try:
        call = ast.parse("\n".join(lines).strip(), mode="eval").body
        named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if not named or call.func.id != "tool_call" or call.args:
            raise ValueError("no call of tool_call with named arguments")
        values = {entry.arg: ast.literal_eval(entry.value) for entry in call.keywords}
        if None in values:
            raise ValueError("an argument without a name")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"the call of {message.metadata} cannot be read: {error}") from None
    return ToolCall(message.metadata, values)


def _literal(value: Any) -> str:
    """A value in Python; texts in double quotes, as in ChatGLM3's examples."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
