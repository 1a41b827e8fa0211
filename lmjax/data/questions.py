"""Questions about a text whose answers are parts of it, from JSON lines (SQuAD)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from lmjax.config import config
from lmjax.data.documents import BadRecord, Document
from lmjax.data.sources import JsonRecords
from lmjax.data.spans import SpanKind
from lmjax.data.tokenizers import Tokenizer

WORD = re.compile(r"\s*(?:\w+|[^\w\s])")  # with the white space before it
CONTEXT, ANSWERS = "context", "answers"  # metadata of a question


@config
class Questions(JsonRecords):
    """Questions about a context, each with answers that are parts of it, in JSON lines.

    Each line has question, context and answers, as {"text": ["1867"], "answer_start": [17]}, where
    answer_start counts characters; the lists are empty where the context has no answer (SQuAD 2.0).
    The first answer is learnt, and any of them is right.

    Each question is a group of one document (data.rows=groups): the tokens of the question, what
    closes it, and those of the context, which is cut into words before. Its labels are 0, the
    number in its group, and 1 where there is an answer.
    """

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        question, context = (self._text(record, key) for key in ("question", CONTEXT))
        answers = read_answers(record, context)
        span = None
        if answers:
            text, start = answers[0]
            span = start, start + len(text)
        yield Document(
            text=f"{question}\n{context}",
            identity=identity,
            group=context,  # of its questions, none is held out from the others
            metadata={
                **(self.metadata_of(record) or {}),
                CONTEXT: context,
                ANSWERS: [text for text, _ in answers],
            },
            labels=(0.0, float(span is not None)),
            encode=functools.partial(encode_question, question=question, context=context, at=span),
        )


def read_answers(record: dict[str, Any], context: str) -> list[tuple[str, int]]:
    """The answers of a line, each with the number of its first character in the context.

    Raises:
      BadRecord: they are not as they should be, or not in the context.
    """
    given = record.get(ANSWERS)
    texts, starts = (
        given.get(key) if isinstance(given, dict) else None for key in ("text", "answer_start")
    )
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise BadRecord("'answers' should have the lists 'text' and 'answer_start' of one length")
    for text, start in zip(texts, starts):
        whole = isinstance(text, str) and isinstance(start, int) and start >= 0
        if not whole or not text.strip() or context[start : start + len(text)] != text:
            raise BadRecord(f"the answer {text!r} is not at character {start!r} of the context")
    return list(zip(texts, starts))


def context_tokens(tokenizer: Tokenizer, context: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a context, and of each the first character of its word and one past its last.

    A word is letters and digits, or another character. Words have tokens of their own, so that the
    tokens do not depend on where an answer is.
    """
    tokens: list[int] = []
    characters: list[tuple[int, int]] = []
    for found in WORD.finditer(context):
        word = found.group()
        own = tokenizer.encode(word)
        tokens += own
        characters += [(found.end() - len(word.lstrip()), found.end())] * len(own)
    return tokens, characters


def encode_question(
    tokenizer: Tokenizer, question: str, context: str, at: tuple[int, int] | None
) -> tuple[list[int], list[tuple[int, int, SpanKind]]]:
    """See `Document.encode`: the question, and the context as spans, of which one is the answer.

    Args:
      tokenizer: of the text.
      question, context: texts.
      at: first character of the answer in the context, and one past its last; None: there is none.
    """
    before = [*tokenizer.opening, *tokenizer.encode(question)]
    before += tokenizer.closing or (tokenizer.end,)
    own, characters = context_tokens(tokenizer, context)
    tokens = [*before, *own, *tokenizer.closing]
    edges: list[tuple[int, SpanKind]] = [(len(before), "second")]
    if at is not None:
        inside = [n for n, (low, high) in enumerate(characters) if low < at[1] and at[0] < high]
        if inside:
            edges.append((len(before) + inside[0], "answer"))
            edges.append((len(before) + inside[-1] + 1, "second"))
    ends = [*(first for first, _ in edges[1:]), len(tokens)]
    return tokens, [(a, b, kind) for (a, kind), b in zip(edges, ends, strict=True) if a < b]
