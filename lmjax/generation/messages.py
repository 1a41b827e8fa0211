"""Conversations, and what a chat format is: how they become tokens, and where a reply ends."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.data.tokenizers import TextPiece, Tokenizer

ROLES = ("system", "user", "assistant", "observation")


class ToolCall(NamedTuple):
    """An assistant's wish to have a tool called."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: system, user, assistant, or observation (what a tool gave back).
      content: the text.
      metadata: stands behind the role in ChatGLM3's format: the tool that is called.
      tools: descriptions of tools as JSON values, for a system message.
      calls: tools that an assistant's message calls, for formats that write them by themselves.
    """

    role: str
    content: str
    metadata: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    calls: Sequence[ToolCall] = ()


class ChatFormat(abc.ABC):
    """Base of the formats that turn conversations into tokens, and end replies.

    Attributes:
      title: what users are told that it is.
      stop_strings: texts that end a reply.
    """

    title: str
    stop_strings: tuple[str, ...]

    @abc.abstractmethod
    def render(self, messages: Sequence[Message], reply: bool = True) -> list[TextPiece]:
        """The pieces of a conversation, in order.

        Args:
          messages: the conversation.
          reply: end with what opens the assistant's next message.

        Raises:
          UserError: no message, or one that the format cannot express.
        """

    @abc.abstractmethod
    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True
    ) -> list[int]:
        """The tokens of a conversation; no text of a message becomes a special token.

        Raises:
          UserError: as `render`, or the tokenizer is of another model.
        """

    @abc.abstractmethod
    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens that end a reply. UserError if the tokenizer lacks one."""

    def read_reply(self, text: str) -> Message:
        """The assistant's message that a generated text is, without white space around it."""
        return Message("assistant", text.strip())
