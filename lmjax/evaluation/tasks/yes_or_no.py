"""Tasks with two answers: PIQA, WinoGrande, BoolQ."""

from __future__ import annotations

from typing import ClassVar

from lmjax.config import config
from lmjax.evaluation.requests import ContinuationRequest, ModelRequest
from lmjax.evaluation.tasks.choices import ACCURACY, ChoiceTask
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.task import Item, Measure


@config
class PIQA(ChoiceTask):
    """PIQA: two ways to do something (Bisk et al. 2019, arXiv:1911.11641); lines with a label."""

    draws_one_more: ClassVar[bool] = True

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        choices = record.text("sol1"), record.text("sol2")
        gold = record.index(record.value("label"), 2, "label")
        prompt = f"Question: {record.text('goal')}\nAnswer:"
        return Item(prompt, choices[gold], choices, gold, identity=record.where)


@config
class WinoGrande(ChoiceTask):
    """WinoGrande: the word that fills a blank (Sakaguchi et al. 2019, arXiv:1907.10641).

    The rest of the sentence is scored behind each word, as its authors do.
    """

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY,)
    draws_one_more: ClassVar[bool] = True

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        sentence, answer = record.text("sentence"), _number_of(record)
        before, blank, after = sentence.partition("_")
        if not blank or answer not in ("1", "2"):
            name, value = ("sentence", sentence) if not blank else ("answer", answer)
            raise record.wrong(name, value, "a sentence with a blank _" if not blank else "1 or 2")
        choices = tuple(before + record.text(name) for name in ("option1", "option2"))
        gold = int(answer) - 1
        return Item(choices[gold], after.strip(), choices, gold, identity=record.where)

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`: one continuation behind two contexts."""
        examples = context.removesuffix(item.prompt)
        return tuple(
            ContinuationRequest(examples + choice, self.delimiter + item.answer)
            for choice in item.choices
        )


def _number_of(record: Record) -> str:
    """The answer, 1 or 2; TensorFlow Datasets has a label, 0 or 1."""
    if record.has("answer"):
        return record.text("answer")
    return str(1 + record.index(record.value("label", "answer"), 2, "label"))


@config
class BoolQ(ChoiceTask):
    """BoolQ: questions about a passage, answered with yes or no (Clark et al. 2019)."""

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY,)
    draws_one_more: ClassVar[bool] = True

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`: the authors' lines, or those of SuperGLUE."""
        value = record.value("label", "answer")
        gold = int(value) if isinstance(value, bool) else record.index(value, 2, "label")
        choices = ("no", "yes")
        prompt = f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:"
        return Item(prompt, choices[gold], choices, gold, identity=record.where)
