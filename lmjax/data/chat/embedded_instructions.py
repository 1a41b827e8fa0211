"""Instructions that need no download: questions about Python's own library, and their answers."""

from __future__ import annotations

import abc
import itertools
import platform
from collections.abc import Iterator

from lmjax.config import UserError, config, fingerprint
from lmjax.data.chat.conversations import make_document
from lmjax.data.chat.messages import Message
from lmjax.data.chat.requests import Dialogue, RequestSource, make_request
from lmjax.data.chat.templates import PLAIN, ChatTemplate
from lmjax.data.documents import Document, HashFiles, OnSkip, Part, Source, digest, is_held_out
from lmjax.data.embedded import EMPTY_LINE, TOPIC, EmbeddedCorpus, docstrings

LONGEST = 300  # characters of an answer; longer ones are left out
VERSION = "1"  # to be raised when other questions are made of the same files


@config
class EmbeddedQuestions(Source, abc.ABC):
    """Base of the sources of questions made of the docstrings of Python's standard library.

    "What does textwrap.dedent(text) do?" is answered by the docstring's first paragraph, and "What
    does this?" with that paragraph by the name and signature. Those of a module are on one side of
    the held-out split.

    The help topics are left out: some eighty sections of a reference, which answer no short
    question (many begin with a grammar), and of which a held-out twentieth is four; some
    distributions have none.
    """

    template: ChatTemplate = PLAIN  # the format that they are written in

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: the modules of the library."""
        return tuple(p for p in EmbeddedCorpus().parts() if not p.name.startswith(TOPIC))

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`."""
        return digest(VERSION, fingerprint(self), platform.python_version(), str(self.parts()))

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        for question, answer, identity in questions_of(part.name):
            yield self.document_of(question, answer, identity)._replace(group=part.name)

    @abc.abstractmethod
    def document_of(self, question: str, answer: str, identity: str) -> Document:
        """A document about a question and its answer."""


@config
class EmbeddedInstructions(EmbeddedQuestions):
    """Questions about Python's standard library with their answers, to learn from."""

    def document_of(self, question: str, answer: str, identity: str) -> Document:
        """See `EmbeddedQuestions.document_of`: a conversation."""
        talk = [Message("user", question), Message("assistant", answer)]
        return make_document(talk, self.template, identity)


@config
class EmbeddedRequests(EmbeddedQuestions, RequestSource):
    """Questions about Python's standard library, to reply to; the answer is in the metadata."""

    every: int = 1  # `dialogues` gives each so many-th question
    # `dialogues` leaves out the modules that data.held_out, of this share, holds out
    held_out: float = 0.0

    def validate(self) -> None:
        """Raises UserError for a share that is none."""
        if self.every < 1 or not 0 <= self.held_out < 1:
            raise UserError(
                f"every={self.every} and held_out={self.held_out}: give at least 1, and a share "
                "from 0 to below 1"
            )

    def document_of(self, question: str, answer: str, identity: str) -> Document:
        """See `EmbeddedQuestions.document_of`: a request."""
        document = make_request([Message("user", question)], self.template, identity)
        return document._replace(metadata={"answer": answer})

    def dialogues(self) -> Iterator[Dialogue]:
        """See `RequestSource.dialogues`."""
        found = (
            Dialogue([Message("user", question)], {"answer": answer})
            for part in self.parts()
            if not is_held_out(Document("", part.name, group=part.name), self.held_out)
            for question, answer, _ in questions_of(part.name)
        )
        return itertools.islice(found, 0, None, self.every)


def questions_of(module: str) -> Iterator[tuple[str, str, str]]:
    """Questions about a module, their answers, and what each is about.

    Args:
      module: name of its file, as in `EmbeddedCorpus.parts`.
    """
    for name, text in docstrings(module):
        answer = " ".join(EMPTY_LINE.split(text.strip())[0].split())
        if answer and len(answer) <= LONGEST:
            yield f"What does {name} do?", answer, f"{module}, {name}"
            yield f"What does this? {answer}", name, f"{module}, {name}"
