"""Addition: sums that are made here, by a hard and by smooth measures."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import ClassVar

from lmjax.config import UserError, config
from lmjax.data.documents import is_held_out
from lmjax.data.sums import END, draw_numbers, sum_answer, sum_document, sum_question
from lmjax.evaluation.edit_distance import edit_distance
from lmjax.evaluation.requests import ContinuationRequest, ModelAnswer, ModelRequest, WrittenRequest
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure

DRAWS = 20  # times as many as are needed, or as there are, before what was found is enough


@config
class Addition(EvaluationTask):
    """Sums of two numbers of as many digits, as `SumTexts` writes them, without a file.

    The answer must be right as a whole for exact_match, a hard measure. Smooth ones are the bits of
    a right answer's token (its end counts), and the edits that make the written answer the right
    one (Schaeffer et al. 2023, arXiv:2304.15004).
    """

    path: str = ""  # none: the sums are made
    digits: int = 3  # digits of the numbers
    items: int = 200  # sums; all of them that are held out, where there are fewer
    held_out: float = 0.1  # data.held_out of the training: its sums are the ones that are asked
    units_first: bool = False  # the answer's digits from the units on: 12+30=24

    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("exact_match"),
        Measure("edit_distance", False),
        Measure("bits_per_token", False, "rate", "token"),
    )
    generates: ClassVar[bool] = True
    separator: ClassVar[str] = END
    delimiter: ClassVar[str] = ""

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        super().validate()
        if self.path or self.examples_path:
            raise UserError(f"{self.name}: path: the sums are made, and read from no file")
        for name in ("digits", "items"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.held_out <= 1:
            raise UserError(f"held_out={self.held_out}: must be above 0, up to 1")

    def read_items(self, path: str) -> list[Item]:
        """See `EvaluationTask.read_items`: different sums, the same whenever they are made.

        UserError: none of the sums with so few digits is held out.
        """
        generator, found = random.Random(f"{self.seed} items"), {}
        most = min(self.items / self.held_out, 100**self.digits)
        for _ in range(DRAWS * math.ceil(most)):
            numbers = draw_numbers(generator, self.digits)
            if is_held_out(sum_document(*numbers), self.held_out):
                found[numbers] = self._item(*numbers)
            if len(found) == self.items:
                break
        if not found:
            raise UserError(
                f"{self.name}: no sum of {self.digits} digits is held out by held_out="
                f"{self.held_out}"
            )
        return list(found.values())

    def _item(self, first: int, second: int) -> Item:
        question = sum_question(first, second)
        answer = sum_answer(first, second, self.units_first)
        return Item(question, answer, identity=question.removesuffix("="))

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`; there are no records."""
        raise record.wrong("sum", record.values, "made, and read from no file")

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        return (
            WrittenRequest(context, (END,), self._most_tokens),
            ContinuationRequest(context, item.answer + END),
        )

    def measure(self, item: Item, answers: Sequence[ModelAnswer]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        written, likelihood = answers
        text = written.texts[0]
        return {
            "exact_match": float(text == item.answer),
            "edit_distance": float(edit_distance(text, item.answer)),
            "bits_per_token": (likelihood.log_probability, float(likelihood.tokens)),
        }

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        return f"a newline, the end token, or {self._most_tokens} tokens"

    @property
    def _most_tokens(self) -> int:
        return self.digits + 3
