"""Records of instruction data: the layouts in use, and the conversations that they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lmjax.data.chat.messages import Message, ToolCall, text_of
from lmjax.data.documents import BadRecord

# Names of roles in public data sets, and ours.
ROLE_NAMES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function"), "observation"),
}
CALL_KEYS = ("name", "arguments")
LARGEST = 3.4e38  # what float32 holds
Record = Mapping[str, Any]


class RecordLayout(NamedTuple):
    """A layout that records of instruction data have.

    Attributes:
      name: how users know it.
      keys: what a record of this layout has.
      read: record -> its dialogues, each a list of messages; texts where it holds no messages.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Record], list[list[Message] | str]]


def find_layout(record: Record) -> RecordLayout:
    """Finds the layout of a record by its keys.

    Raises:
      BadRecord: it has none that is known.
    """
    for layout in LAYOUTS:
        if all(record.get(key) is not None for key in layout.keys):
            return layout
    names = ", ".join(map(repr, list(record)[:12])) or "none"
    known = "; ".join(f"{layout.name} has {' and '.join(layout.keys)}" for layout in LAYOUTS)
    raise BadRecord(f"no layout of conversations has the keys {names}. Known are: {known}")


def _messages(role_key: str, text_key: str) -> Callable[[Any], list[Message]]:
    """Reader of a list of messages with these keys."""

    def read(turns: Any) -> list[Message]:
        if not isinstance(turns, list | tuple) or not turns:
            raise BadRecord("the conversation is empty, or no list of messages")
        return [_message(turn, number) for number, turn in enumerate(turns)]

    def _message(turn: Any, number: int) -> Message:
        if not isinstance(turn, Mapping) or not {role_key, text_key} <= turn.keys():
            raise BadRecord(f"message {number} should have {role_key!r} and {text_key!r}")
        role = read_role(turn[role_key], f"message {number}")
        calls = _read_calls(turn.get("tool_calls"), f"'tool_calls' of message {number}")
        text = "" if calls and turn[text_key] is None else turn[text_key]
        content = require_text(text, f"{text_key!r} of message {number}")
        metadata = require_text(turn.get("metadata") or "", f"'metadata' of message {number}")
        tools = _require_objects(turn.get("tools") or (), f"'tools' of message {number}")
        return Message(role, content, metadata=metadata, tools=tools, calls=calls)

    return read


def read_role(value: Any, name: str) -> str:
    """Our name of a role.

    Raises:
      BadRecord: no such role is known.
    """
    if not isinstance(value, str) or value not in ROLE_NAMES:
        raise BadRecord(f"{name} has the role {value!r}; known are {', '.join(ROLE_NAMES)}")
    return ROLE_NAMES[value]


def _require_objects(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise BadRecord(f"{name} should be a list of JSON objects")
    return tuple(value)


def _read_calls(value: Any, name: str) -> tuple[ToolCall, ...]:
    """Calls of tools in OpenAI's form, whose arguments are an object, or one written as a text."""
    calls = []
    for entry in _require_objects(value or (), name):
        call = entry.get("function", entry)
        called, given = (call.get(key) if isinstance(call, Mapping) else None for key in CALL_KEYS)
        try:
            arguments = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(called, str) or not isinstance(arguments, dict):
            raise BadRecord(f"{name}: a call should have a name, and arguments as a JSON object")
        calls.append(ToolCall(called, arguments))
    return tuple(calls)


def require_number(value: Any, name: str) -> float:
    """A finite number.

    Raises:
      BadRecord: it is none, or has no room in float32, in which labels are kept.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRecord(f"{name} is {str(value)[:40]!r}, not a number") from None
    if not abs(number) < LARGEST:
        raise BadRecord(f"{name} is {number}, not a finite number")
    return number


def require_text(value: Any, name: str) -> str:
    """A text, or the texts of a list of parts (OpenAI's form), one after another."""
    if isinstance(value, list | tuple):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in value]
        if kinds and all(kind == "text" for kind in kinds):
            return "".join(require_text(part.get("text"), name) for part in value)
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{name} holds half a surrogate pair") from None
    return value


ROLE_CONTENT, FROM_VALUE = _messages("role", "content"), _messages("from", "value")


def message_record(message: Message) -> dict[str, Any]:
    """A message as JSON values, which `ROLE_CONTENT` reads."""
    record: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    if message.metadata:
        record["metadata"] = message.metadata
    if message.tools:
        record["tools"] = [dict(tool) for tool in message.tools]
    if message.calls:
        record["tool_calls"] = [
            {"function": {"name": call.name, "arguments": call.arguments}} for call in message.calls
        ]
    return record


def _read_messages(record: Record) -> list[list[Message] | str]:
    return [_with_system(record, ROLE_CONTENT(record["messages"]))]


def _read_conversations(record: Record) -> list[list[Message] | str]:
    return [_with_system(record, FROM_VALUE(record["conversations"]))]


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """The messages after the system text that some sets keep apart (ShareGPT)."""
    system = record.get("system")
    if not system or messages[0].role == "system":
        return messages
    return [Message("system", require_text(system, "'system'")), *messages]


def _read_instruction(record: Record) -> list[list[Message] | str]:
    """Self-Instruct's layout, with or without a context."""
    texts = {
        key: require_text(record.get(key) or "", repr(key)) for key in ("instruction", "input")
    }
    request = Message("user", texts["instruction"], context=texts["input"])
    return [_with_system(record, [request, _reply(record, "output")])]


def _read_completion(record: Record) -> list[list[Message] | str]:
    """A prompt and what follows it; each may be messages, as TRL has them."""
    completion = record["completion"]
    if isinstance(completion, str):
        return [[*read_request(record["prompt"]), _reply(record, "completion")]]
    return [[*read_request(record["prompt"]), *ROLE_CONTENT(completion)]]


def read_request(prompt: Any) -> list[Message]:
    """The messages of a prompt, which may be a text."""
    if isinstance(prompt, str):
        return [Message("user", require_text(prompt, "'prompt'"))]
    return ROLE_CONTENT(prompt)


def _reply(record: Record, key: str) -> Message:
    return Message("assistant", require_text(record[key], repr(key)))


def _read_tree(record: Record) -> list[list[Message] | str]:
    """OpenAssistant's layout: every way from the first message to a last one is a dialogue."""

    def walk(node: Any, before: tuple[Message, ...]) -> Iterator[list[Message]]:
        message, replies = read_node(node)
        path = (*before, message)
        if not replies:
            yield list(path)
        for reply in replies:
            yield from walk(reply, path)

    return list(walk(record["prompt"], ()))


def read_node(node: Any) -> tuple[Message, list[Mapping[str, Any]]]:
    """A message of OpenAssistant's trees, and the replies to it that were not deleted.

    Raises:
      BadRecord: it is none.
    """
    if not isinstance(node, Mapping):
        raise BadRecord(f"a message of the tree is {type(node).__name__}, not a JSON object")
    role = read_role(node.get("role"), "a message of the tree")
    replies = _require_objects(node.get("replies") or (), "'replies' of a message")
    message = Message(role, require_text(node.get("text"), "'text' of a message"))
    return message, [reply for reply in replies if not reply.get("deleted")]


def _read_text(record: Record) -> list[list[Message] | str]:
    return [require_text(record["text"], "'text'")]


LAYOUTS = (
    RecordLayout("a list of messages", ("messages",), _read_messages),
    RecordLayout("ShareGPT", ("conversations",), _read_conversations),
    RecordLayout("instructions", ("instruction", "output"), _read_instruction),
    RecordLayout("prompts with completions", ("prompt", "completion"), _read_completion),
    RecordLayout("a tree of messages", ("message_tree_id", "prompt"), _read_tree),
    RecordLayout("plain text", ("text",), _read_text),
)
