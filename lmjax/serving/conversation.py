"""Conversations and tools, from OpenAI's form to a chat format's and back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.data.chat.messages import ChatFormat, Message, ToolCall
from lmjax.data.chat.templates import ChatTemplate
from lmjax.data.chat.tool_calls import read_tool_call, write_tool_call
from lmjax.serving.schemas import ChatBody, MessageBody, ToolChoice

ROLES = {"developer": "system", "tool": "observation"}
MARKED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
ARGUMENTS = ("arguments", "parameters")  # names of a call's arguments in what models write


def read_messages(body: ChatBody, chat: ChatFormat) -> list[Message]:
    """The conversation of a body, with its tools, in the form of a chat format.

    Raises:
      UserError: arguments of a call that are no JSON object, or that the format cannot write.
    """
    messages = own_messages(body.messages, chat)
    if not body.tools or body.tool_choice == "none":
        return messages
    tools = tuple(tool.model_dump(exclude_none=True) for tool in body.tools)
    if writes_python(chat):
        tools = tuple(tool["function"] for tool in tools)
    if messages[0].role == "system":
        return [Message("system", messages[0].content, tools=tools), *messages[1:]]
    return [Message("system", "", tools=tools), *messages]


def own_messages(bodies: Sequence[MessageBody], chat: ChatFormat) -> list[Message]:
    """Messages in the form of a chat format. UserError: see `read_messages`."""
    messages = [read_message(body, number) for number, body in enumerate(bodies)]
    if not writes_python(chat):
        return messages
    return [own for one in messages for own in _as_python(one)]


def writes_python(chat: ChatFormat) -> bool:
    """Returns whether a call is a line of Python behind the tool's name (ChatGLM3)."""
    return isinstance(chat, ChatTemplate) and any("{metadata}" in part for part in chat.assistant)


def _as_python(message: Message) -> list[Message]:
    """A message that calls tools as ChatGLM3 writes it: what it says, then each call."""
    if not message.calls:
        return [message]
    said = [Message(message.role, message.content)] if message.content else []
    return [*said, *map(write_tool_call, message.calls)]


def read_python_call(
    text: str, names: Sequence[str], chat: ChatFormat
) -> tuple[str, list[ToolCall]]:
    """As `read_calls`, of a format that `writes_python`: one call is a whole answer."""
    message = chat.read_reply(text)
    try:
        call = read_tool_call(message) if message.metadata in names else None
    except ValueError:
        call = None
    return (message.content, []) if call is None else ("", [call])


def read_message(body: MessageBody, number: int) -> Message:
    """A message of ours. UserError: see `read_messages`."""
    content = body.content or ""
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    calls = []
    for call in body.tool_calls or ():
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise UserError(
                f"messages.{number}.tool_calls: the arguments of {call.function.name!r} are no"
                " JSON object"
            )
        calls.append(ToolCall(call.function.name, arguments))
    return Message(ROLES.get(body.role, body.role), content, calls=tuple(calls))


def calls_schema(body: ChatBody) -> dict[str, Any] | None:
    """JSON schema of the call that an answer has to be; None where it may be anything.

    Raises:
      UserError: there are no tools, or not the one that is wanted.
    """
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None
    tools = body.tools or []
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise UserError(f"tool_choice: there is no tool {choice.function.name!r}")
    if not tools:
        raise UserError(f"tool_choice: {choice!r} needs tools")
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def read_calls(text: str, names: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """The calls in an answer, and what it says besides.

    Known are JSON objects between the marks of Qwen and Hermes, and one JSON object, or a list of
    them, that is the whole answer (LLaMA 3).

    Args:
      text: the answer, with the names of special tokens in it.
      names: of the tools; what names another one is no call.
    """
    marked = [_read_call(part, names) for part in MARKED.findall(text)]
    if marked and all(marked):
        return MARKED.sub("", text).strip(), marked
    try:
        value = json.loads(text.strip())
    except (ValueError, RecursionError):
        return text, []
    calls = [_call(one, names) for one in (value if isinstance(value, list) else [value])]
    return ("", calls) if calls and all(calls) else (text, [])


def _read_call(text: str, names: Sequence[str]) -> ToolCall | None:
    try:
        return _call(json.loads(text), names)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, names: Sequence[str]) -> ToolCall | None:
    """A call; None where the value is none."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = next((value[key] for key in ARGUMENTS if key in value), {})
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None
