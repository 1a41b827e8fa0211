"""The base of tasks with answers to choose from: the likeliest continuation is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from lmjax.config import config
from lmjax.evaluation.requests import ContinuationRequest, Likelihood, ModelRequest
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure

ACCURACY = Measure("acc")
# Log-likelihoods divided by the number of characters of the answer, without the space before it.
BY_CHARACTERS = Measure("acc_norm")
BY_BYTES = Measure("acc_bytes")  # by the number of bytes of UTF-8


@config
class ChoiceTask(EvaluationTask):
    """Base of the tasks whose answers are given."""

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY, BY_CHARACTERS, BY_BYTES)

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`: the log-likelihood of each choice."""
        return tuple(
            ContinuationRequest(context, self.delimiter + choice) for choice in item.choices
        )

    def measure(self, item: Item, answers: Sequence[Likelihood]) -> ItemScores:
        """See `EvaluationTask.measure`; of equal choices the first counts as chosen."""
        values = np.array([answer.log_probability for answer in answers])
        found = {}
        for measure in self.measures:
            if measure in LENGTHS:
                chosen = int(np.argmax(values / LENGTHS[measure](item.choices)))
                found[measure.name] = float(chosen in right_choices(item))
        return found

    def chance(self, item: Item) -> ItemScores:
        """See `EvaluationTask.chance`."""
        share = len(right_choices(item)) / len(item.choices)
        return {measure.name: share for measure in self.measures if measure in LENGTHS}


LENGTHS = {
    ACCURACY: lambda choices: np.ones(len(choices)),
    BY_CHARACTERS: lambda choices: np.array([max(1, len(c)) for c in choices], float),
    BY_BYTES: lambda choices: np.array([max(1, len(c.encode())) for c in choices], float),
}


def right_choices(item: Item) -> tuple[int, ...]:
    """Numbers of the right choices: mostly one, or those that the item's details name."""
    return item.details.get("golds", (item.gold,))


def chosen_letters(options: Sequence[str]) -> str:
    """Options as lines that begin with letters: A. the first."""
    return "\n".join(f"{letter_of(n)}. {option}" for n, option in enumerate(options))


def letter_of(number: int) -> str:
    """A of 0, B of 1."""
    return chr(ord("A") + number)
