"""Requests that a model is to answer, from files of prompts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lmjax.config import UserError, config
from lmjax.data.chat.messages import ChatFormat, Message, text_of
from lmjax.data.chat.records import read_request
from lmjax.data.chat.templated import TemplatedRecords
from lmjax.data.documents import BadRecord, Document
from lmjax.data.spans import SpanKind
from lmjax.data.tokenizers import Tokenizer


class Dialogue(NamedTuple):
    """Messages that are to be replied to.

    Attributes:
      messages: of the request.
      metadata: fields of its line that are kept.
    """

    messages: list[Message]
    metadata: dict[str, Any]


@config
class Requests(TemplatedRecords):
    """Requests in JSON lines, compressed or not: prompt, a text or messages, or messages.

    A reply at the end of the messages is left out. Fields of `metadata`, such as the right answer,
    are what a reward can read beside request and reply.

    Lines with the same first request are on the same side of the held-out split.
    """

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        messages = _messages(record)
        yield Document(
            text=self._render(messages),
            identity=identity,
            group=next((text_of(one) for one in messages if one.role == "user"), ""),
            metadata=self.metadata_of(record),
            labels=(0.0,),  # a group of its own
            encode=functools.partial(_encode, template=self.template, messages=messages),
        )

    def dialogues(self) -> Iterator[Dialogue]:
        """The messages of each line."""

        def dialogue(record: dict[str, Any], _: str) -> tuple[Dialogue]:
            messages = _messages(record)
            self._render(messages)
            return (Dialogue(messages, self.metadata_of(record) or {}),)

        for part in self.parts():
            for found in self._lines(part, lambda message: None, dialogue):
                yield from found

    def _render(self, messages: Sequence[Message]) -> str:
        """The text of a request.

        Raises:
          BadRecord: the format cannot express it.
        """
        try:
            return "".join(piece.text for piece in self.template.render(messages))
        except UserError as error:
            raise BadRecord(str(error)) from None


def _messages(record: dict[str, Any]) -> list[Message]:
    for key in ("prompt", "messages"):
        if (given := record.get(key)) is not None:
            messages = read_request(given)
            while messages and messages[-1].role == "assistant":
                messages.pop()
            if not messages:
                raise BadRecord("there is no message to reply to")
            return messages
    names = ", ".join(map(repr, list(record)[:12])) or "none"
    raise BadRecord(f"a request has the key 'prompt' or 'messages'; the keys are {names}")


def _encode(
    tokenizer: Tokenizer, template: ChatFormat, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int, SpanKind]]]:
    """See `Document.encode`: the tokens that a model is given to reply."""
    return template.encode(tokenizer, messages), []
