"""CoQA: questions in a row about a story, each behind those before (Reddy et al. 2019).

"CoQA: A Conversational Question Answering Challenge", arXiv:1808.07042.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.cleaning.units import has_spaceless
from lmjax.evaluation.requests import ModelRequest, Written, WrittenRequest
from lmjax.evaluation.span_measures import answer_f1, exact_match
from lmjax.evaluation.tasks.records import Record, read_records
from lmjax.evaluation.tasks.squad import character_scores
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure

STOP = "\nQ:"  # where a model goes on with a question of its own
EXACT_MATCH, F1 = Measure("exact_match"), Measure("f1")


@config
class CoQA(EvaluationTask):
    """CoQA's JSON files and others of their layout: exact match and F1 of each turn's answer.

    A question stands behind the story and the earlier questions with their right answers. Where
    several people answered, a prediction is compared with all but one of them, each of them left
    out in turn, so that it is measured as the people are. Examples are whole conversations about
    other stories of the same source.
    """

    # characters of languages without spaces are words of their own, and punctuation of any script
    # is left out; see `lmjax.evaluation.answer_match`
    by_characters: bool = False
    # whose: EleutherAI's harness asks the last question of each story alone, counts answers that
    # differ only in case once, and shows examples of any source
    rules: Literal["authors", "harness"] = "authors"
    max_tokens: int = 256  # most tokens of an answer

    measures: ClassVar[tuple[Measure, ...]] = (EXACT_MATCH, F1)
    generates: ClassVar[bool] = True
    draws_one_more: ClassVar[bool] = True

    def validate(self) -> None:
        """Raises UserError for examples that could tell an answer."""
        super().validate()
        if self.drawing == "harness" and self.rules != "harness":
            raise UserError("drawing=harness: draws whole stories, as rules=harness asks them")

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`: one for each turn that is asked."""
        turns = (turn for story in read_records(path) for turn in turns_of(story))
        asks_all = self.rules == "authors"
        return [self.read_item(turn) for turn in turns if asks_all or turn.value("is_last")]

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`; the record is one of `turns_of`."""
        questions, before = record.value("questions"), record.value("before")
        answers, source = record.value("answers"), str(record.values.get("source") or "")
        if self.rules == "harness":
            answers, source = _different(answers), ""
        if not self.by_characters and any(map(has_spaceless, answers)):
            raise UserError(
                f"{record.where}: the answer {answers[0][:30]!r} has no spaces between the words "
                "that F1 counts: set by_characters=true"
            )
        told = [f"Q: {asked}\n\nA: {said}\n\n" for asked, said in zip(questions, before)]
        prompt = f"{record.text('story')}\n\n{''.join(told)}Q: {questions[-1]}\n\nA:"
        details = {
            "answers": answers,
            "story": record.text("story"),
            "is_last": record.value("is_last"),
        }
        return Item(prompt, answers[0], subject=source, identity=record.where, details=details)

    def may_show(self, example: Item, item: Item) -> bool:
        """See `EvaluationTask.may_show`: whole conversations, and none about the same story.

        A later turn of the same story holds the answer.
        """
        return example.details["is_last"] and example.details["story"] != item.details["story"]

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        return (WrittenRequest(context, (STOP,), self.max_tokens),)

    def measure(self, item: Item, answers: Sequence[Written]) -> ItemScores:
        """See `EvaluationTask.measure`; the answer is the first line that is written."""
        text = answers[0].texts[0].strip().split("\n")[0]
        given = item.details["answers"]
        if len(given) == 1:
            return self._scores(text, given)
        return _mean([self._scores(text, _others(given, n)) for n in range(len(given))])

    def people(self, item: Item) -> ItemScores:
        """See `EvaluationTask.people`: each answer among the others."""
        given = item.details["answers"]
        if len(given) == 1:
            return {}
        return _mean([self._scores(one, _others(given, n)) for n, one in enumerate(given)])

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        return f"{STOP!r}, the end token, or {self.max_tokens} tokens; its first line counts"

    def _scores(self, prediction: str, answers: Sequence[str]) -> ItemScores:
        return (character_scores if self.by_characters else turn_scores)(prediction, answers)


def turn_scores(prediction: str, answers: Sequence[str]) -> ItemScores:
    """Largest exact match and F1 with one of the answers; two without words are the same."""
    return {
        EXACT_MATCH.name: max(exact_match(prediction, [one], "2.0") for one in answers),
        F1.name: max(answer_f1(prediction, [one], "2.0") for one in answers),
    }


def turns_of(story: Record) -> Iterator[Record]:
    """Yields a record for each question: those up to it, answers before it, and its own ones.

    Lists of texts, and of objects with input_text, are read: the authors' files, the hub's copies
    and TensorFlow Datasets.

    Raises:
      UserError: a field is missing, or there is not one answer for each question.
    """
    questions, answers = _texts(story, "questions"), _texts(story, "answers")
    people = [answers]
    if story.values.get("additional_answers"):
        more = story.part("additional_answers")
        people += [_texts(more, name) for name in more.values]
    for given in people:
        if len(given) != len(questions) or not questions:
            raise story.wrong("answers", len(given), f"one for each of {len(questions)} questions")
    fields = {"source": story.values.get("source"), "story": story.text("story")}
    for number in range(len(questions)):
        turn = {
            "questions": questions[: number + 1],
            "before": answers[:number],
            "answers": tuple(given[number] for given in people),
            "is_last": number == len(questions) - 1,
        }
        where = f"{story.where}, question {number + 1}"
        yield Record({**fields, **turn}, where, story.file)


def _texts(record: Record, name: str) -> tuple[str, ...]:
    """A field with texts, bare or as input_text of objects."""
    found = record.value(name)
    if isinstance(found, Mapping):
        return record.part(name).texts("input_text")
    if isinstance(found, list) and any(isinstance(one, Mapping) for one in found):
        turns = [Record(one, f"{record.where}, {name}", record.file) for one in found]
        return tuple(turn.text("input_text") for turn in turns)
    return record.texts(name)


def _others(answers: Sequence[str], number: int) -> Sequence[str]:
    return [*answers[:number], *answers[number + 1 :]]


def _mean(scores: Sequence[ItemScores]) -> ItemScores:
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def _different(answers: Sequence[str]) -> tuple[str, ...]:
    """Answers without those that an earlier one is, but for case."""
    found: dict[str, str] = {}
    for one in answers:
        found.setdefault(one.lower(), one)
    return tuple(found.values())
