"""Conversations to train on, from files of instruction data."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmjax.config import UserError, config
from lmjax.data.chat.messages import ChatFormat, Message, RenderedPiece, text_of
from lmjax.data.chat.records import find_layout
from lmjax.data.chat.templated import TemplatedRecords
from lmjax.data.chat.templates import ChatTemplate
from lmjax.data.documents import BadRecord, Document
from lmjax.data.spans import SpanKind
from lmjax.data.tokenizers import Tokenizer


@config
class Conversations(TemplatedRecords):
    """Conversations in JSON lines, compressed or not, in the layouts of public instruction data.

    Each line has one of these layouts: messages (role, content); conversations (from, value);
    instruction, output and perhaps input; prompt and completion; a tree (message_tree_id, prompt
    with replies), each path of which is a conversation; or text, which is learned whole.

    Lines with the same first request are on the same side of the held-out split.
    """

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        for document in make_documents(record, self.format_of(record), identity):
            yield document._replace(metadata=self.metadata_of(record))

    def dialogues(self) -> Iterator[list[Message]]:
        """The conversations of all lines; those of plain text are left out."""
        for part in self.parts():
            for record in self.records(part, lambda message: None):
                found = find_layout(record).read(record)
                yield from (one for one in found if not isinstance(one, str))

    def format_of(self, record: dict[str, Any]) -> ChatFormat:
        """The format that a line is written in."""
        return self.template

    def layout(self) -> str:
        """Name of the layout of the first line.

        Raises:
          UserError: there is no line, or none that can be read.
        """
        for part in self.parts():
            for record in self.records(part, lambda message: None):
                return find_layout(record).name
        raise UserError(f"there is no conversation in {self.path}")


@config
class ClassFormat:
    """The format of the conversations of one class."""

    name: str  # of the class, as the lines have it
    template: ChatTemplate  # such as OpenChat's with "GPT3" in place of "GPT4 Correct"


@config
class ConditionedConversations(Conversations):
    """Conversations whose format depends on their class, so that a model is conditioned on it.

    OpenChat conditions on the quality of its sources, beside weighing them in the loss
    (`LossWeights`): one class has "GPT4 User", the other "GPT3 User" (Wang et al. 2023,
    arXiv:2309.11235, section 3.2). The trained model talks in `template`, the format of the class
    that is wanted, in which lines of further classes are written too.
    """

    condition: str = "source"  # the field with the class
    formats: tuple[ClassFormat, ...] = ()  # of the classes that have one of their own

    def validate(self) -> None:
        """Raises UserError for a class that has several formats, or none that has one."""
        super().validate()
        names = [one.name for one in self.formats]
        if not names or len(set(names)) < len(names):
            raise UserError(f"formats of the classes {names}: give each class one, of one at least")

    def format_of(self, record: dict[str, Any]) -> ChatFormat:
        """See `Conversations.format_of`."""
        found = {one.name: one.template for one in self.formats}
        value = record.get(self.condition)
        return found.get(value, self.template) if isinstance(value, str) else self.template


def make_documents(
    record: Mapping[str, Any], template: ChatFormat, identity: str
) -> Iterator[Document]:
    """The conversations of a record of one of the known layouts, or its text, as documents.

    Raises:
      BadRecord: it has none of the layouts, or not what its layout should have.
    """
    seen = []
    for dialogue in find_layout(record).read(record):
        if isinstance(dialogue, str):
            if dialogue:
                yield Document(dialogue, identity)
            continue
        while dialogue and dialogue[-1].role != "assistant":
            dialogue.pop()  # nothing is learned of it
        if dialogue not in seen:
            seen.append(dialogue)
            yield make_document(dialogue, template, identity)


def make_document(messages: Sequence[Message], template: ChatFormat, identity: str) -> Document:
    """A conversation as a document, with its replies as spans.

    Args:
      messages: the conversation.
      template: the format that it is written in.
      identity: of the document.

    Raises:
      BadRecord: it has no reply, or the format cannot express it.
    """
    if not any(one.role == "assistant" and (one.content or one.calls) for one in messages):
        raise BadRecord("the conversation has no message of an assistant, so there is no reply")
    try:
        pieces = template.render_replies(messages)
    except UserError as error:
        raise BadRecord(str(error)) from None
    request = next((text_of(one) for one in messages if one.role == "user"), "")
    return Document(
        text="".join(piece.text for piece in pieces),
        identity=identity,
        group=request,
        encode=functools.partial(_encode, template=template, pieces=pieces),
    )


def _encode(
    tokenizer: Tokenizer, template: ChatFormat, pieces: Sequence[RenderedPiece]
) -> tuple[list[int], list[tuple[int, int, SpanKind]]]:
    """See `Document.encode`; what is between the replies is a user's, so that all is in spans."""
    tokens, replies = template.encode_replies(tokenizer, pieces)
    spans: list[tuple[int, int, SpanKind]] = []
    before = 0
    for first, end in [*replies, (len(tokens), len(tokens))]:
        if before < first:
            spans.append((before, first, "user"))
        if first < end:
            spans.append((first, end, "assistant"))
        before = end
    return tokens, spans
