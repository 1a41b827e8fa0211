"""ARC: science questions of schools, easy and hard (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from typing import Any

from lmjax.config import config
from lmjax.evaluation.tasks.choices import ChoiceTask, letter_of
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.task import Item


@config
class Arc(ChoiceTask):
    """ARC easy or challenge, whichever the file is; answers are scored as texts."""

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`: AI2's lines, or those of its copies."""
        if isinstance(record.values.get("question"), str):
            question, options = record.text("question"), record.part("choices")
            texts, given = options.texts("text"), options.value("label")
            numbered = isinstance(given, list) and any(isinstance(one, int) for one in given)
            labels = list(map(_letter, given)) if numbered else options.texts("label")
        else:
            stem = record.part("question")
            question = stem.text("stem")
            options = [
                Record(one, f"{record.where}, choices", record.file)
                for one in stem.value("choices")
            ]
            labels = [option.text("label") for option in options]
            texts = tuple(option.text("text") for option in options)
        key = _letter(record.value("answerKey"))
        if key not in labels:
            raise record.wrong("answerKey", key, f"one of {', '.join(labels)}")
        gold = list(labels).index(key)
        return Item(
            prompt=f"Question: {question}\nAnswer:",
            answer=texts[gold],
            choices=tuple(texts),
            gold=gold,
            identity=str(record.values.get("id", record.where)),
        )


def _letter(value: Any) -> Any:
    """A label; TensorFlow Datasets numbers the letters, A is 0."""
    return letter_of(value) if isinstance(value, int) else value
