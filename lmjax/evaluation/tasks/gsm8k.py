"""GSM8K: word problems of grade school (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from lmjax.config import config
from lmjax.evaluation.answer_match import MARKER, last_number, numbers_match
from lmjax.evaluation.requests import ModelRequest, Written, WrittenRequest
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure

STOP = ("Question:", "</s>", "<|im_end|>")
STRICT = re.compile(r"#### (-?[0-9.,]+)")
# As the harness finds the last number: signs alone count too, so that "42..." is none.
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@config
class GSM8K(EvaluationTask):
    """GSM8K: the model writes a solution, whose number is compared.

    Usual are shots=5 or 8 from the training set (`examples_path`).
    """

    max_tokens: int = 256  # most tokens of a solution

    # The first two are the harness's rules (strict-match and flexible-extract), the third is ours:
    # see `lmjax.evaluation.answer_match`.
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("exact_match"),
        Measure("flexible_match"),
        Measure("last_number"),
    )
    generates: ClassVar[bool] = True

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`."""
        answer = record.text("answer")
        if MARKER not in answer or last_number(answer) is None:
            raise record.wrong("answer", answer, "a solution whose number stands behind ####")
        return Item(f"Question: {record.text('question')}\nAnswer:", answer, identity=record.where)

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        return (WrittenRequest(context, STOP, self.max_tokens),)

    def measure(self, item: Item, answers: Sequence[Written]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        text, gold = answers[0].texts[0], item.answer
        strict, flexible = STRICT.search(text), FLEXIBLE.findall(text)
        found = strict[1] if strict else None, flexible[-1] if flexible else None
        exact, loose = (value is not None and _spelt(value) == _spelt(gold) for value in found)
        return {
            "exact_match": float(exact),
            "flexible_match": float(loose),
            "last_number": float(numbers_match(text, gold)),
        }

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        return f"{', '.join(map(repr, STOP))}, the end token, or {self.max_tokens} tokens"


def _spelt(number: str) -> str:
    """A number as the harness compares it: no commas, no dollar sign, no dot at its end."""
    number = number.rpartition("#### ")[2].replace(",", "").replace("$", "")
    return re.sub(r"\.$", "", number).lower()
