"""Records of instruction data: the layouts in use, and the conversations that they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lmjax.data.chat.messages import Message
from lmjax.data.documents import BadRecord

# Names of roles in public data sets, and ours.
ROLE_NAMES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function"), "observation"),
}
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
        role = turn[role_key]
        if role not in ROLE_NAMES:
            known = ", ".join(ROLE_NAMES)
            raise BadRecord(f"message {number} has the role {role!r}; known are {known}")
        metadata, tools = turn.get("metadata") or "", turn.get("tools") or ()
        content = require_text(turn[text_key], f"{text_key!r} of message {number}")
        return Message(ROLE_NAMES[role], content, metadata=metadata, tools=tools)

    return read


def require_text(value: Any, name: str) -> str:
    """A text, or the texts of a list of parts (OpenAI's form), one after another."""
    if isinstance(value, list | tuple):
        kinds = {part.get("type") for part in value if isinstance(part, Mapping)}
        if kinds == {"text"}:
            return "".join(require_text(part.get("text"), name) for part in value)
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{name} holds half a surrogate pair") from None
    return value


ROLE_CONTENT, FROM_VALUE = _messages("role", "content"), _messages("from", "value")


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
    """A prompt and what follows it; both may be messages, as TRL has them."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        return [[Message("user", require_text(prompt, "'prompt'")), _reply(record, "completion")]]
    return [ROLE_CONTENT([*prompt, *completion])]


def _reply(record: Record, key: str) -> Message:
    return Message("assistant", require_text(record[key], repr(key)))


def _read_tree(record: Record) -> list[list[Message] | str]:
    """OpenAssistant's layout: every way from the first message to a last one is a dialogue."""

    def walk(node: Any, before: tuple[Message, ...]) -> Iterator[list[Message]]:
        role, text = (node.get(key) for key in ("role", "text"))
        if role not in ROLE_NAMES:
            raise BadRecord(f"a message of the tree has the role {role!r}; known are {ROLE_NAMES}")
        path = (*before, Message(ROLE_NAMES[role], require_text(text, "'text' of a message")))
        replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
        if not replies:
            yield list(path)
        for reply in replies:
            yield from walk(reply, path)

    if not isinstance(record["prompt"], Mapping):
        raise BadRecord("'prompt' of a tree should be its first message")
    return list(walk(record["prompt"], ()))


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
