"""Questions about a text that the model answers in writing: SQuAD, XQuAD and others like them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from lmjax.config import UserError, config
from lmjax.evaluation.requests import ModelRequest, Written, WrittenRequest
from lmjax.evaluation.span_measures import answer_f1, exact_match
from lmjax.evaluation.tasks.records import TFDS, Record, read_files
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure


@config
class SQuAD(EvaluationTask):
    """SQuAD's JSON files: exact match and F1 of a written answer."""

    version: Literal["1.1", "2.0"] = "1.1"  # whose rule counts where an answer has no word
    # characters of languages without spaces are words of their own, and punctuation of any script
    # is left out
    by_characters: bool = False
    max_tokens: int = 48  # most tokens of an answer

    measures: ClassVar[tuple[Measure, ...]] = (Measure("exact_match"), Measure("f1"))
    generates: ClassVar[bool] = True

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`."""
        if path.startswith(TFDS):  # a question a record
            return super().read_items(path)
        items = [item for file in read_files(path) for item in self._questions(file)]
        if not items:
            raise UserError(f"{self.name}: there is no question in {path}")
        return items

    def _questions(self, file) -> Iterator[Item]:
        try:
            articles = json.loads(file.text)["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file.name} is no file of SQuAD: {error!r}") from None
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    where = f"{file.name}, question {asked.get('id')}"
                    fields = {**asked, "context": paragraph["context"]}
                    fields["title"] = article.get("title", "")
                    yield self.read_item(Record(fields, where))

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        given = record.value("answers")
        if isinstance(given, Mapping):  # TensorFlow Datasets
            given = [{"text": text} for text in given["text"]]
        answers = tuple(str(one["text"]) for one in given)
        if not answers and self.version == "1.1":
            raise UserError(f"{record.where} has no answer, which version=2.0 allows")
        if not self.by_characters and any(map(needs_characters, answers)):
            raise UserError(
                f"{record.where}: the answer {answers[0][:30]!r} has no spaces between the words "
                "that F1 counts: set by_characters=true"
            )
        prompt = (
            f"Title: {record.text('title')}\n\nBackground: {record.text('context')}\n\n"
            f"Question: {record.text('question')}\n\nAnswer:"
        )
        shown = answers[0] if answers else "unanswerable"
        return Item(prompt, shown, identity=record.where, details={"answers": answers})

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        return (WrittenRequest(context, ("\n",), self.max_tokens),)

    def measure(self, item: Item, answers: Sequence[Written]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        text, wanted = answers[0].texts[0].strip(), item.details["answers"]
        if text.lower() == "unanswerable":
            text = ""
        if self.by_characters:
            text, wanted = spaced(text), tuple(map(spaced, wanted))
        return {
            "exact_match": exact_match(text, wanted, self.version),
            "f1": answer_f1(text, wanted, self.version),
        }

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        return f"a newline, the end token, or {self.max_tokens} tokens"


def spaced(text: str) -> str:
    """The text with spaces round characters that are words, and without punctuation."""
    kept = []
    for letter in text:
        if unicodedata.category(letter).startswith("P"):
            continue
        kept.append(f" {letter} " if _is_word(letter) else letter)
    return " ".join("".join(kept).split())


def needs_characters(text: str) -> bool:
    """Returns whether a text has words that no spaces part."""
    return any(map(_is_word, text))


def _is_word(letter: str) -> bool:
    """Returns whether a character is of a script that puts no spaces between words."""
    name = unicodedata.name(letter, "")
    return name.startswith(("CJK ", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))
