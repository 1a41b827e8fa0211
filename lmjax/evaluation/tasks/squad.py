"""Questions about a text that the model answers in writing: SQuAD, XQuAD and others like them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.units import has_spaceless
from lmjax.evaluation.answer_match import text_f1, texts_match
from lmjax.evaluation.requests import ModelRequest, Written, WrittenRequest
from lmjax.evaluation.span_measures import answer_f1, exact_match
from lmjax.evaluation.tasks.records import TFDS, Record, read_files
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure

# As the harness asks for SQuAD 2.0.
TEMPLATE = "Title: {title}\n\nBackground: {context}\n\nQuestion: {question}\n\nAnswer:"
NO_ANSWER = "unanswerable"


@config
class SQuAD(EvaluationTask):
    """SQuAD's JSON files: exact match and F1 of a written answer.

    EleutherAI's harness scores an answer that says there is none as any other text:
    unanswerable="" does so too.
    """

    version: Literal["1.1", "2.0"] = "1.1"  # whose rule counts where an answer has no word
    # characters of languages without spaces are words of their own, and punctuation of any script
    # is left out; see `lmjax.evaluation.answer_match`
    by_characters: bool = False
    template: str = TEMPLATE  # what the model reads, with fields of a question
    unanswerable: str = NO_ANSWER  # answer that says that there is none; empty: none does
    max_tokens: int = 256  # most tokens of an answer

    measures: ClassVar[tuple[Measure, ...]] = (Measure("exact_match"), Measure("f1"))
    generates: ClassVar[bool] = True
    draws_one_more: ClassVar[bool] = True

    def validate(self) -> None:
        """Raises UserError for a template without the question."""
        super().validate()
        if "{question}" not in self.template:
            raise UserError(f"template={self.template!r}: it has no {{question}}")

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`."""
        if path.startswith(TFDS) or ".jsonl" in path.rpartition("/")[2]:  # a question a record
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
        if not self.by_characters and any(map(has_spaceless, answers)):
            raise UserError(
                f"{record.where}: the answer {answers[0][:30]!r} has no spaces between the words "
                "that F1 counts: set by_characters=true"
            )
        prompt = record.filled(self.template)
        shown = answers[0] if answers else self.unanswerable or NO_ANSWER
        return Item(prompt, shown, identity=record.where, details={"answers": answers})

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        return (WrittenRequest(context, ("\n",), self.max_tokens),)

    def measure(self, item: Item, answers: Sequence[Written]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        text, wanted = answers[0].texts[0].strip(), item.details["answers"]
        if self.unanswerable and text.lower() == self.unanswerable.lower():
            text = ""
        if self.by_characters:
            return character_scores(text, wanted or ("",))
        return {
            "exact_match": exact_match(text, wanted, self.version),
            "f1": answer_f1(text, wanted, self.version),
        }

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        return f"a newline, the end token, or {self.max_tokens} tokens"


def character_scores(prediction: str, answers: Sequence[str]) -> ItemScores:
    """Exact match and F1 whose words are characters in languages without spaces."""
    return {
        "exact_match": float(texts_match(prediction, answers)),
        "f1": text_f1(prediction, answers),
    }
