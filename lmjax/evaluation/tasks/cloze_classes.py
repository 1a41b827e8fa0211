"""Classes by cloze: texts are classified by the likelihood of each class's words behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmjax.config import UserError, config
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, ModelRequest
from lmjax.evaluation.tasks.choices import ACCURACY, BY_CHARACTERS, ChoiceTask
from lmjax.evaluation.tasks.records import FIELD, Record
from lmjax.evaluation.tasks.task import Item, ItemScores, Measure

BY_DOMAIN = Measure("acc_pmi")


@config
class ClozeClasses(ChoiceTask):
    """Files of texts with a class each, asked as a cloze: "... It was" great, or terrible.

    The class with the likeliest words is the answer (Schick and Schuetze 2021, arXiv:2001.07676);
    the report has macro F1 and confusions. With `domain`, acc_pmi divides the words' probability by
    the one behind that text alone, since some words are likely anywhere (Holtzman et al. 2021,
    arXiv:2104.08315).
    """

    words: tuple[str, ...] = ()  # words of each class, as in ("terrible", "great")
    labels: tuple[str, ...] = ()  # what the file calls the classes; none: the words, or 0, 1, ...
    label: str = "label"  # the field with the class
    template: str = "{text} It was"  # what stands before the words; {text} is the field "text"
    domain: str = ""  # end of the template that says nothing of the text, as in "It was"

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Accuracies."""
        return (ACCURACY, BY_CHARACTERS, *([BY_DOMAIN] if self.domain else []))

    def validate(self) -> None:
        """Raises UserError for classes and templates that cannot be meant."""
        super().validate()
        for name in ("words", "labels"):
            given = getattr(self, name)
            if len(set(given)) < len(given) or not all(map(str.strip, given)):
                raise UserError(f"{name}={given}: each class has its own, which are no white space")
        if len(self.words) == 1:
            raise UserError(f"words={self.words}: give those of two classes or more")
        if self.labels and len(self.labels) != len(self.words):
            raise UserError(f"labels={self.labels}: there are {len(self.words)} classes in words")
        if not FIELD.search(self.template):
            raise UserError(f"template={self.template!r}: it has no field, such as {{text}}")
        if self.template != self.template.rstrip():
            raise UserError(
                f"template={self.template!r}: white space at its end belongs to the words"
            )

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`; UserError also without classes."""
        if not self.words:
            raise UserError(f'{self.name}: words: give those of each class, as in ("bad", "good")')
        return super().read_items(path)

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        gold = self._class_of(record)
        prompt = record.filled(self.template)
        return Item(prompt, self.words[gold], self.words, gold, identity=record.where)

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`: with `domain`, each class's words behind it too."""
        asked = super().requests(item, context)
        if not self.domain:
            return asked
        alone = (ContinuationRequest(self.domain, self.delimiter + words) for words in self.words)
        return (*asked, *alone)

    def measure(self, item: Item, answers: Sequence[Likelihood]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        behind, alone = answers[: len(self.words)], answers[len(self.words) :]
        found = super().measure(item, behind)
        if self.domain:
            gains = [
                one.log_probability - other.log_probability
                for one, other in zip(behind, alone, strict=True)
            ]
            found[BY_DOMAIN.name] = float(np.argmax(gains) == item.gold)
        return found

    def chance(self, item: Item) -> ItemScores:
        """See `EvaluationTask.chance`."""
        return {measure.name: 1 / len(self.words) for measure in self.measures}

    def _class_of(self, record: Record) -> int:
        """Number of a record's class. UserError: it is none."""
        value = record.value(self.label)
        name = str(value).strip()
        names = self.labels or self.words
        if name in names:
            return names.index(name)
        if self.labels or not name.isdigit() or int(name) >= len(self.words):
            names = self.labels or (*self.words, f"a number below {len(self.words)}")
            raise record.wrong(self.label, value, f"one of {', '.join(names)}")
        return int(name)
