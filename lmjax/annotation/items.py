"""Items to annotate: a prompt, and perhaps answers to it, from files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lmjax.config import UserError
from lmjax.data.chat.messages import Message
from lmjax.data.chat.records import require_text
from lmjax.data.chat.requests import Requests, read_messages
from lmjax.data.documents import BadRecord, digest

FEWEST = 2  # answers that can be compared


class AnnotationItem(NamedTuple):
    """A prompt that is to be answered, or whose answers are to be ranked.

    Attributes:
      identity: 12 hexadecimal digits that tell its prompt, and its answers where it has some.
      prompt: as the line has it, a text or a list of messages, for the lines that are written.
      messages: the same, as it is shown.
      answers: those that the line has; none where a model is to write them.
      source: the file, and the offset in it.
    """

    identity: str
    prompt: str | list[Any]
    messages: list[Message]
    answers: tuple[str, ...]
    source: str


def read_items(
    path: str | tuple[str, ...], check: Callable[[AnnotationItem], None]
) -> list[AnnotationItem]:
    """The items of files, in their order; a line that repeats another is left out.

    Args:
      path: of JSON lines, compressed or not: prompt, a text or messages, or messages; and perhaps
        answers, a list of texts.
      check: raises BadRecord or UserError for an item that cannot be served.

    Raises:
      UserError: there is no file or no line, or one has no prompt or cannot be served.
    """

    def read(record: Mapping[str, Any], source: str) -> list[AnnotationItem]:
        item = _read_item(record, source)
        try:
            check(item)
        except UserError as error:
            raise BadRecord(str(error)) from None
        return [item]

    def refuse(message: str) -> None:
        raise UserError(message)

    source = Requests(path=path, on_error="skip")
    found: dict[str, AnnotationItem] = {}
    for part in source.parts():
        for (item,) in source.lines(part, refuse, read):
            found.setdefault(item.identity, item)
    if not found:
        raise UserError(f"there is no prompt in {path}")
    return list(found.values())


def _read_item(record: Mapping[str, Any], source: str) -> AnnotationItem:
    messages = read_messages(record)
    prompt = record["prompt"] if record.get("prompt") is not None else record["messages"]
    if not isinstance(prompt, str):
        prompt = list(prompt[: len(messages)])
    answers = _read_answers(record.get("answers"))
    text = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    identity = digest(require_text(text, "the prompt"), *answers)
    return AnnotationItem(identity, prompt, messages, answers, source)


def _read_answers(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise BadRecord("'answers' should be a list of texts")
    answers = tuple(require_text(answer, "an answer") for answer in given)
    if len(answers) < FEWEST:
        raise BadRecord(f"'answers' has {len(answers)}; {FEWEST} or more can be compared")
    if not all(map(str.strip, answers)):
        raise BadRecord("an answer is empty")
    return answers
