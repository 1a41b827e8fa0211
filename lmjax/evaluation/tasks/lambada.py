"""LAMBADA: the last word of a passage (Paperno et al. 2016, arXiv:1606.06031)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lmjax.config import config
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, ModelRequest
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure


@config
class Lambada(EvaluationTask):
    """LAMBADA: the last word, with the text as the file has it.

    OpenAI's file (GPT-2) and the authors' own are both read: lines with a field text.
    """

    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("acc"),
        Measure("perplexity", False, "perplexity"),
    )

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        text = record.text("text", "passage")
        before, space, word = text.rpartition(" ")
        if not space or not word:
            raise record.wrong("text", text, "a passage whose last word stands behind a space")
        return Item(before, word, identity=record.where)

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        return (ContinuationRequest(context, self.delimiter + item.answer),)

    def measure(self, item: Item, answers: Sequence[Likelihood]) -> ItemScores:
        """See `EvaluationTask.measure`: the whole word must be the likeliest."""
        [answer] = answers
        return {"acc": float(answer.is_greedy), "perplexity": answer.log_probability}
