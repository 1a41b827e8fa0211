"""Conversations, and what a chat format is: how they become tokens, and where a reply ends."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.data.tokenizers import TextPiece, Tokenizer

ROLES = ("system", "user", "assistant", "observation")


class ToolCall(NamedTuple):
    """An assistant's wish to have a tool called."""

    name: str
    arguments: dict[str, Any]


class RenderedPiece(NamedTuple):
    """A part of a rendered conversation.

    Attributes:
      text: a text, or the name of a special token.
      special: whether it is that name.
      reply: whether an assistant writes it: its message, and what ends that.
    """

    text: str
    special: bool
    reply: bool


class ReplySpan(NamedTuple):
    """Tokens of a conversation that an assistant writes: `first`, and one past the last."""

    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: system, user, assistant, or observation (what a tool gave back).
      content: the text.
      metadata: in ChatGLM3's format after the role: the tool that is called.
      tools: descriptions of tools as JSON values, for a system message.
      calls: tools that an assistant's message calls, for formats that write them by themselves.
      context: a text that a user's request is about, for formats that set it apart (Alpaca).
    """

    role: str
    content: str
    metadata: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    calls: Sequence[ToolCall] = ()
    context: str = ""


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
    def render_replies(self, messages: Sequence[Message]) -> list[RenderedPiece]:
        """The pieces of a whole conversation, as `render` gives them, cut at the ends of replies.

        Raises:
          UserError: as `render`, or the template does not show where its replies are.
        """

    @abc.abstractmethod
    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens that end a reply. UserError if the tokenizer lacks one."""

    @abc.abstractmethod
    def _tokens(self, tokenizer: Tokenizer, pieces: Sequence[TextPiece]) -> list[int]:
        """The tokens of pieces that follow each other."""

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True
    ) -> list[int]:
        """The tokens of a conversation; no text of a message becomes a special token.

        Raises:
          UserError: as `render`, or the tokenizer is of another model.
        """
        return self._tokens(tokenizer, self.render(messages, reply))

    def encode_replies(
        self, tokenizer: Tokenizer, rendered: Sequence[RenderedPiece]
    ) -> tuple[list[int], list[ReplySpan]]:
        """The tokens of what `render_replies` gives, and which of them an assistant writes.

        What comes before a reply has the tokens that a model is given to write it, so no token goes
        across the border. A reply includes the token that ends it. Where the format writes none
        after the last one, the end of a document is put there.

        Raises:
          UserError: the tokenizer is of another model.
        """
        cut: list[int] = []  # tokens up to the last border that no token may cross
        pieces: list[TextPiece] = []  # after it
        tokens: list[int] = []  # of these
        spans = []
        for reply, run in itertools.groupby(rendered, lambda piece: piece.reply):
            added = [TextPiece(piece.text, piece.special) for piece in run]
            first, found = len(cut) + len(tokens), self._tokens(tokenizer, pieces + added)
            if found[: len(tokens)] == tokens:
                pieces += added
            else:
                cut, pieces = cut + tokens, added
                found = self._tokens(tokenizer, added)
            tokens = found
            if reply:
                spans.append(ReplySpan(first, len(cut) + len(tokens)))
        tokens = cut + tokens
        ended = not spans or spans[-1].end < len(tokens)
        if not ended and tokens[-1] not in self.stop_tokens(tokenizer):
            tokens.append(tokenizer.end)
            spans[-1] = ReplySpan(spans[-1].first, len(tokens))
        return tokens, spans

    def read_reply(self, text: str) -> Message:
        """The assistant's message that a generated text is, without white space around it."""
        return Message("assistant", text.strip())


def text_of(message: Message) -> str:
    """A message's text, with its context as a paragraph of its own."""
    return "\n\n".join(filter(None, (message.content, message.context)))


def join_texts(pieces: Sequence[TextPiece]) -> list[TextPiece]:
    """Pieces with the texts that meet made one."""
    joined: list[TextPiece] = []
    for piece in pieces:
        if joined and not (piece.special or joined[-1].special):
            joined[-1] = TextPiece(joined[-1].text + piece.text, False)
        else:
            joined.append(TextPiece(piece.text, piece.special))
    return joined
