"""Comparisons of answers to one request, from files of preference data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lmjax.config import UserError, config
from lmjax.data.chat.conversations import make_document
from lmjax.data.chat.messages import Message
from lmjax.data.chat.records import (
    ROLE_CONTENT,
    Record,
    read_node,
    read_request,
    require_number,
    require_text,
)
from lmjax.data.chat.templated import TemplatedRecords
from lmjax.data.documents import BadRecord, Document

# Labels of the documents of a comparison: number in it, rank (0 is the best, equal ones are ties),
# and the margin by which the better one should win (the same for all; 0 where none is given).
LABELS = ("number", "rank", "margin")
TURN = re.compile(r"\n\nHuman:|\n\nAssistant:")  # of hh-rlhf's transcripts
# LLaMA 2's grades of a pair, and the margins that they ask for (arXiv:2307.09288, table 27).
GRADES = "significantly better", "better", "slightly better", "negligibly better"
SMALL_MARGINS = 1.0, 2 / 3, 1 / 3, 0.0
LARGE_MARGINS = 3.0, 2.0, 1.0, 0.0


class RankedAnswers(NamedTuple):
    """Conversations that differ in their last reply, with the rank of each, and a margin."""

    conversations: list[list[Message]]
    ranks: list[float]
    margin: float = 0.0


@config
class Grades:
    """A field of lines that grades how much better the better answer is, in place of a margin."""

    field: str = "grade"  # the field with the grade
    # the grades, as texts or as numbers without their signs, the clearest one first
    names: tuple[str, ...] = GRADES
    margins: tuple[float, ...] = SMALL_MARGINS  # that each grade asks for

    def validate(self) -> None:
        """Raises UserError for other than one margin of each grade."""
        if len(self.names) != len(self.margins) or len(set(self.names)) < len(self.names):
            raise UserError(
                f"names={self.names} and margins={self.margins}: give each grade once, and a "
                "margin for each"
            )
        if min(self.margins, default=0) < 0:
            raise UserError(f"margins={self.margins}: give numbers of 0 or more")

    def margin(self, record: Record) -> float:
        """Margin that a line's grade asks for.

        Raises:
          BadRecord: the line has no grade, or one that is not known.
        """
        value = record.get(self.field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        name = f"{abs(value):g}" if is_number else str(value).strip().lower()
        found = dict(zip(map(str.lower, self.names), self.margins, strict=True))
        if name not in found:
            known = ", ".join(map(repr, self.names))
            raise BadRecord(f"{self.field!r} is {value!r}; the grades are {known}")
        return found[name]


@config
class Comparisons(TemplatedRecords):
    """Answers that were compared, in JSON lines, compressed or not, in the layouts in use.

    Each line has one of these: chosen and rejected (texts as in hh-rlhf, or messages), perhaps with
    prompt and margin; prompt, answers and ranks, or scores; instruction and completions
    (UltraFeedback); prompt, completion and label (KTO); or a tree with ranks (OpenAssistant).

    Lines with the same first request are on the same side of the held-out split.
    """

    grades: Grades | None = None  # where lines have grades, from which margins follow

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`: the answers of each comparison, the best first."""
        metadata = self.metadata_of(record)
        graded = None if self.grades is None else self.grades.margin(record)
        for conversations, ranks, margin in read_comparisons(record):
            margin = margin if graded is None else graded
            ordered = sorted(zip(ranks, conversations, strict=True), key=lambda pair: pair[0])
            documents = [make_document(talk, self.template, identity) for _, talk in ordered]
            # A comparison is on one side of the held-out split, also where requests differ.
            group = documents[0].group or documents[0].text
            for number, ((rank, _), document) in enumerate(zip(ordered, documents, strict=True)):
                labels = float(number), float(rank), float(margin)
                yield document._replace(metadata=metadata, labels=labels, group=group)

    def layout(self) -> str:
        """Name of the layout of the first line.

        Raises:
          UserError: there is no line, or none that can be read.
        """
        for part in self.parts():
            for record in self.records(part, lambda message: None):
                return _find(record)[0]
        raise UserError(f"there is no comparison in {self.path}")


def read_comparisons(record: Record) -> list[RankedAnswers]:
    """The comparisons of a line.

    Raises:
      BadRecord: it has none of the known layouts, or not what its layout should have.
    """
    found = _find(record)[2](record)
    for conversations, ranks, _ in found:
        if len(conversations) != len(ranks):
            raise BadRecord(f"{len(conversations)} answers have {len(ranks)} ranks or scores")
        if not conversations:
            raise BadRecord("the comparison has no answer")
        if any(messages[-1].role != "assistant" for messages in conversations):
            raise BadRecord("a conversation does not end with a reply, which is what is compared")
    return found


def _find(record: Record) -> tuple[str, tuple[str, ...], Callable[[Record], list[RankedAnswers]]]:
    for layout in LAYOUTS:
        if all(record.get(key) is not None for key in layout[1]):
            return layout
    names = ", ".join(map(repr, list(record)[:12])) or "none"
    known = "; ".join(f"{name} has {' and '.join(keys)}" for name, keys, _ in LAYOUTS)
    raise BadRecord(f"no layout of comparisons has the keys {names}. Known are: {known}")


def _read_pair(record: Record) -> list[RankedAnswers]:
    prompt = read_request(record["prompt"]) if record.get("prompt") is not None else []
    sides = [_conversation(prompt, record[key], key) for key in ("chosen", "rejected")]
    return [RankedAnswers(sides, [0, 1], _margin(record))]


def _margin(record: Record) -> float:
    return require_number(record.get("margin") or 0, "'margin'")


def _conversation(prompt: Sequence[Message], answer: Any, key: str) -> list[Message]:
    """A whole conversation, whether its answer repeats the prompt or not."""
    if isinstance(answer, str):
        answer = require_text(answer, repr(key))
        if not prompt:
            return _transcript(answer, key)
        return [*prompt, Message("assistant", answer)]
    messages = ROLE_CONTENT(answer)
    repeats = messages[: len(prompt)] == list(prompt)
    return messages if repeats and len(messages) > len(prompt) else [*prompt, *messages]


def _transcript(text: str, key: str) -> list[Message]:
    """The messages of a text with turns of Human and Assistant (hh-rlhf)."""
    begin, *texts = TURN.split(text)
    roles = ["user" if "Human" in mark else "assistant" for mark in TURN.findall(text)]
    if begin.strip() or not texts:
        raise BadRecord(
            f"{key!r} is a text without a prompt, and does not begin with a turn of 'Human:'"
        )
    return [Message(role, text.strip()) for role, text in zip(roles, texts, strict=True)]


def _read_ranked(record: Record) -> list[RankedAnswers]:
    prompt, answers = read_request(record["prompt"]), record["answers"]
    if not isinstance(answers, list | tuple):
        raise BadRecord("'answers' should be a list")
    conversations = [_conversation(prompt, answer, "answers") for answer in answers]
    return [RankedAnswers(conversations, _ranks(record), _margin(record))]


def _ranks(record: Record) -> list[float]:
    """Ranks, of which 0 is the best, from ranks or from scores, of which the highest is best."""
    given = record.get("ranks", record.get("scores"))
    if not isinstance(given, list | tuple):
        raise BadRecord("'ranks' or 'scores' should be a list of numbers, one for each answer")
    ranks = [require_number(number, "a rank or a score") for number in given]
    return ranks if "ranks" in record else [-rank for rank in ranks]


def _read_completions(record: Record) -> list[RankedAnswers]:
    """UltraFeedback's layout."""
    prompt, ranks, conversations = read_request(record["instruction"]), [], []
    given = record["completions"]
    if not isinstance(given, list | tuple):
        raise BadRecord("'completions' should be a list")
    for completion in given:
        try:
            answer, value = completion["response"], completion["overall_score"]
        except (KeyError, TypeError):
            raise BadRecord("a completion should have 'response' and 'overall_score'") from None
        conversations.append(_conversation(prompt, answer, "response"))
        ranks.append(-require_number(value, "'overall_score'"))
    return [RankedAnswers(conversations, ranks)]


def _read_label(record: Record) -> list[RankedAnswers]:
    """KTO's layout: an answer that is wanted, or not."""
    if not isinstance(record["label"], bool):
        raise BadRecord(f"'label' is {record['label']!r}, not true or false")
    conversation = _conversation(read_request(record["prompt"]), record["completion"], "completion")
    return [RankedAnswers([conversation], [0.0 if record["label"] else 1.0])]


def _read_tree(record: Record) -> list[RankedAnswers]:
    """OpenAssistant's layout: the ranked replies to each message of a tree."""
    found: list[RankedAnswers] = []

    def walk(node: Any, before: tuple[Message, ...]) -> None:
        message, replies = read_node(node)
        path = (*before, message)
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if message.role == "user" and len(ranked) > 1:
            answers = [[*path, read_node(reply)[0]] for reply in ranked]
            ranks = [require_number(reply["rank"], "'rank' of a message") for reply in ranked]
            found.append(RankedAnswers(answers, ranks))
        for reply in replies:
            walk(reply, path)

    walk(record["prompt"], ())
    return found


LAYOUTS = (
    ("pairs", ("chosen", "rejected"), _read_pair),
    ("ranked answers", ("prompt", "answers"), _read_ranked),
    ("UltraFeedback", ("instruction", "completions"), _read_completions),
    ("answers with a label (KTO)", ("prompt", "completion", "label"), _read_label),
    ("a tree with ranks", ("message_tree_id", "prompt"), _read_tree),
)
