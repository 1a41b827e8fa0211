"""Conversations as tokens: chat formats written down as data, and ChatGLM3's tool calls."""

from __future__ import annotations

import ast
import dataclasses
import json
import keyword
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.config import UserError, config, preset
from lmjax.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant", "observation")
SLOTS = {"content": "", "metadata": "", "round": 1, "system": ""}
FENCE = "```"
INTERPRETER = "interpreter"  # the metadata of ChatGLM3's messages that hold a program


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: system, user, assistant, or observation (what a tool gave back).
      content: the text.
      metadata: stands behind the role in ChatGLM3's format: the tool that is called.
      tools: descriptions of tools as JSON values, for a system message.
    """

    role: str
    content: str
    metadata: str = ""
    tools: Sequence[Mapping[str, Any]] = ()


class Piece(NamedTuple):
    """A part of a rendered conversation: a text, or the name of a special token."""

    text: str
    special: bool


class ToolCall(NamedTuple):
    """An assistant's wish to have a tool called."""

    name: str
    arguments: dict[str, Any]


@config
class ChatTemplate:
    """How a conversation becomes tokens.

    A role is a tuple of parts, each encoded by itself. A part is a special token or text with
    slots: {content}, {metadata}, {round} (1 at the first user message), and in a user's part
    {system}, if the system text goes into the first user message. No text of a message can become
    a special token. Where roles are plain text (falcon, chatglm2, plain) a message can imitate one.
    """

    special: tuple[str, ...] = ()  # parts that are special tokens
    start: tuple[str, ...] = ()  # parts before the first message
    system: tuple[str, ...] = ()  # parts of a system message; none: there is no such role
    user: tuple[str, ...] = ("{content}",)  # parts of a user message
    assistant: tuple[str, ...] = ("{content}",)  # parts of a reply; a prompt ends before its slots
    observation: tuple[str, ...] = ()  # parts of a tool's result; none: there is no such role
    default_system: str = ""  # system text where the conversation does not begin with one
    tools: str = ""  # system text with slots {content} and {tools}, a JSON list; empty: no tools
    joined: bool = False  # texts that meet are encoded together, also across messages
    strip: bool = False  # drop white space around messages
    stop: tuple[str, ...] = ()  # special tokens that end a reply, besides the end of a document
    stop_strings: tuple[str, ...] = ()  # texts that end a reply
    forbidden: tuple[str, ...] = ()  # what no message may hold, as it would imitate a role

    def validate(self) -> None:
        """Raise UserError for a slot that there is not."""
        parts = [part for role in ROLES for part in getattr(self, role)]
        for part, slots in [(p, SLOTS) for p in parts] + [(self.tools, {"content": 0, "tools": 0})]:
            try:
                part.format(**slots)
            except (KeyError, IndexError, ValueError) as error:
                known = ", ".join(f"{{{name}}}" for name in slots)
                raise UserError(
                    f"chat template: {part!r} is wrong ({error}); slots: {known}"
                ) from None

    def render(self, messages: Sequence[Message], reply: bool = True) -> list[Piece]:
        """The pieces of a conversation, in order.

        Args:
          messages: the conversation.
          reply: end with what opens the assistant's next message.

        Raises:
          UserError: no message, a role or a detail that the format cannot express, or a forbidden
            text.
        """
        if not messages:
            raise UserError("chat: the conversation holds no message")
        if self.default_system and messages[0].role != "system":
            messages = [Message("system", self.default_system), *messages]
        pieces = self._fill(self.start)
        in_user = any("{system}" in part for part in self.user)
        system, number = "", 0
        for message in messages:
            content = self._content(message)
            if message.role == "system" and in_user:
                system += "".join(piece.text for piece in self._fill(self.system, content=content))
                continue
            number += message.role == "user"
            pieces += self._fill(
                getattr(self, message.role),
                content=content,
                metadata=message.metadata,
                round=number,
                system=system,
            )
            if message.role == "user":
                system = ""
        if system:
            raise UserError("chat: this format needs a user message behind the system message")
        if reply:
            pieces += self._fill(self._opening())
        return _join(pieces) if self.joined else pieces

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True
    ) -> list[int]:
        """The tokens of a conversation; see `render`.

        Raises:
          UserError: as `render`, or the tokenizer lacks one of the special tokens.
        """
        tokens: list[int] = []
        for piece in self.render(messages, reply):
            if piece.special:
                tokens.append(_special(tokenizer, piece.text))
            else:
                tokens += tokenizer.encode(piece.text)
        return tokens

    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens that end a reply. UserError if the tokenizer lacks one."""
        return sorted({tokenizer.end, *(_special(tokenizer, name) for name in self.stop)})

    def read_reply(self, text: str) -> Message:
        """The assistant's message that a generated text is, without white space around it."""
        if any("{metadata}" in part for part in self.assistant):
            metadata, _, text = text.partition("\n")
            return Message("assistant", text.strip(), metadata.strip())
        return Message("assistant", text.strip())

    def _content(self, message: Message) -> str:
        """A message's text, with its tools; UserError for what the format cannot express."""
        parts = getattr(self, message.role) if message.role in ROLES else ()
        if not parts:
            known = ", ".join(role for role in ROLES if getattr(self, role))
            raise UserError(f"chat: no role {message.role!r} in this format, only {known}")
        if message.metadata and not any("{metadata}" in part for part in parts):
            raise UserError(f"chat: this format has no place for metadata ({message.metadata!r})")
        if "\n" in message.metadata:
            raise UserError(f"chat: metadata is one line, not {message.metadata!r}")
        for text in self.forbidden:
            if text in message.content:
                raise UserError(f"chat: a message holds {text!r}, which marks roles in this format")
        content = message.content.strip() if self.strip else message.content
        if not message.tools:
            return content
        if not self.tools or message.role != "system":
            raise UserError(f"chat: a {message.role} message has no place for tools in this format")
        tools = json.dumps(list(message.tools), ensure_ascii=False, indent=4)
        return self.tools.format(content=content, tools=tools)

    def _fill(self, parts: Sequence[str], **slots: Any) -> list[Piece]:
        filled = [Piece(part.format(**SLOTS | slots), part in self.special) for part in parts]
        return [piece for piece in filled if piece.text]

    def _opening(self) -> list[str]:
        """The assistant's parts before the first one with a slot."""
        slot = next((n for n, part in enumerate(self.assistant) if "{" in part), None)
        return list(self.assistant[:slot])


def _join(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.special and not joined[-1].special:
            joined[-1] = Piece(joined[-1].text + piece.text, False)
        else:
            joined.append(piece)
    return joined


def _special(tokenizer: Tokenizer, name: str) -> int:
    try:
        return tokenizer.special[name]
    except KeyError:
        raise UserError(
            f"chat: the tokenizer has no special token {name!r}; the format is of another model"
        ) from None


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


TEMPLATES = {
    "plain": ChatTemplate(
        system=("{content}\n\n",),
        user=("User: {content}\n\n",),
        assistant=("Assistant:", " {content}\n\n"),
        joined=True,
        stop_strings=("\n\nUser:",),
    ),
    "chatml": ChatTemplate(
        special=("<|im_start|>", "<|im_end|>"),
        system=("<|im_start|>", "system", "\n", "{content}", "<|im_end|>", "\n"),
        user=("<|im_start|>", "user", "\n", "{content}", "<|im_end|>", "\n"),
        assistant=("<|im_start|>", "assistant", "\n", "{content}", "<|im_end|>", "\n"),
        default_system="You are a helpful assistant.",
        stop=("<|im_end|>", "<|im_start|>"),
    ),
    "llama2": ChatTemplate(
        special=("<s>", "</s>"),
        system=("<<SYS>>\n{content}\n<</SYS>>\n\n",),
        user=("<s>", "[INST] {system}{content} [/INST]"),
        assistant=(" {content} ", "</s>"),
        joined=True,
        strip=True,
        forbidden=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    "baichuan": ChatTemplate(
        special=("<reserved_102>", "<reserved_103>", "</s>"),
        user=("<reserved_102>", "{content}"),
        assistant=("<reserved_103>", "{content}", "</s>"),
        stop=("<reserved_102>",),
    ),
    "baichuan2": ChatTemplate(
        special=("<reserved_106>", "<reserved_107>"),
        system=("{content}",),
        user=("<reserved_106>", "{content}"),
        assistant=("<reserved_107>", "{content}"),
        stop=("<reserved_106>",),
    ),
    "falcon": ChatTemplate(
        system=("System: {content}\n",),
        user=("User: {content}\n",),
        assistant=("Falcon:", " {content}\n"),
        joined=True,
        stop_strings=("\nUser:",),
    ),
    "chatglm2": ChatTemplate(
        special=("[gMASK]", "sop"),
        start=("[gMASK]", "sop"),
        user=("[Round {round}]\n\n问：{content}\n\n答：",),
        assistant=("{content}\n\n",),
        joined=True,
    ),
    "chatglm3": ChatTemplate(
        special=("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        start=("[gMASK]", "sop"),
        system=("<|system|>", "{metadata}\n", "{content}"),
        user=("<|user|>", "{metadata}\n", "{content}"),
        assistant=("<|assistant|>", "{metadata}\n", "{content}"),
        observation=("<|observation|>", "{metadata}\n", "{content}"),
        tools="{content}\n{tools}",
        stop=("<|user|>", "<|observation|>"),
    ),
}


@preset
def chat_template(name: str) -> ChatTemplate:
    """A published chat format, by name.

    plain is ours, for models trained on text alone. The others: chatml is Qwen's, baichuan that of
    Baichuan-13B, falcon that of Falcon-180B; the rest bear their models' names.

    Raises:
      UserError: an unknown name.
    """
    if name not in TEMPLATES:
        raise UserError(f"there is no chat template {name!r}, only {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# By family: the formats of its public chat models, the newest first.
PUBLISHED = {
    "qwen": ("chatml",),
    "qwen2": ("chatml",),
    "qwen3": ("chatml",),
    "llama": ("llama2",),
    "baichuan": ("baichuan",),
    "baichuan2": ("baichuan2",),
    "falcon": ("falcon",),
    "chatglm": ("chatglm3", "chatglm2"),
}


def fitting_template(family: str, tokenizer: Tokenizer) -> str:
    """The name of the chat format that a public model of this family was trained with.

    The newest one all of whose special tokens the tokenizer has.

    Raises:
      UserError: there is none.
    """
    for name in PUBLISHED.get(family, ()):
        if set(TEMPLATES[name].special) <= tokenizer.special.keys():
            return name
    raise UserError(
        f"chat=true: no chat format is known for {family} with this tokenizer; give the name"
        f" of one: {', '.join(TEMPLATES)}"
    )
