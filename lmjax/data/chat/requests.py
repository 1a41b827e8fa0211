"""Requests that a model is to answer, from files of prompts."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.config import UserError, config
from lmjax.data.chat.messages import ChatFormat, Message, text_of
from lmjax.data.chat.records import read_request
from lmjax.data.chat.templated import TemplatedRecords
from lmjax.data.documents import BadRecord, Document, Source
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
class RequestSource(Source, abc.ABC):
    """Base of the sources of requests that are written in a chat format."""

    @abc.abstractmethod
    def dialogues(self) -> Iterator[Dialogue]:
        """The messages of each request."""


@config
class Requests(TemplatedRecords, RequestSource):
    """Requests in JSON lines, compressed or not: prompt, a text or messages, or messages.

    A reply at the end of the messages is left out. Fields of `metadata`, such as the right answer,
    are what a reward can read beside request and reply.

    Lines with the same first request are on the same side of the held-out split.
    """

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        document = make_request(read_messages(record), self.template, identity)
        yield document._replace(metadata=self.metadata_of(record))

    def dialogues(self) -> Iterator[Dialogue]:
        """See `RequestSource.dialogues`: those of all lines."""

        def dialogue(record: dict[str, Any], identity: str) -> tuple[Dialogue]:
            messages = read_messages(record)
            make_request(messages, self.template, identity)  # the format can express it
            return (Dialogue(messages, self.metadata_of(record) or {}),)

        for part in self.parts():
            for found in self.lines(part, lambda message: None, dialogue):
                yield from found


def make_request(messages: Sequence[Message], template: ChatFormat, identity: str) -> Document:
    """Messages that a model is to reply to, as a document.

    Args:
      messages: the last of them is no assistant's.
      template: the format that they are written in.
      identity: of the document.

    Raises:
      BadRecord: the format cannot express them.
    """
    try:
        pieces = template.render(messages)
    except UserError as error:
        raise BadRecord(str(error)) from None
    return Document(
        text="".join(piece.text for piece in pieces),
        identity=identity,
        group=next((text_of(one) for one in messages if one.role == "user"), ""),
        labels=(0.0,),  # a group of its own
        encode=functools.partial(_encode, template=template, messages=messages),
    )


def read_messages(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a line that are to be replied to.

    Raises:
      BadRecord: there are none.
    """
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
