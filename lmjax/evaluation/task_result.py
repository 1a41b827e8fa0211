"""Scores of a task: each item's, and from them those of the task, its subjects and groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from lmjax.evaluation.requests import ContinuationRequest, Likelihood, ModelAnswer, ModelRequest
from lmjax.evaluation.tasks.choices import ACCURACY
from lmjax.evaluation.tasks.task import EvaluationTask, ItemScores, Measure, Question

RESAMPLES = 1000  # of a bootstrap
NORMAL = 1.959964  # standard deviations on both sides of 95 percent


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One number of a task.

    Attributes:
      value: the number.
      error: its standard error over the items; NaN of one item.
      low, high: its 95 percent interval.
      count: number of items that it is of.
    """

    value: float
    error: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Result of a model in a task.

    Attributes:
      task: the task.
      questions: as the model was asked.
      answers: of each question, those to its requests.
      scores: of each question.
    """

    task: EvaluationTask
    questions: Sequence[Question]
    answers: Sequence[Sequence[ModelAnswer]]
    scores: Sequence[ItemScores]

    @classmethod
    def of(
        cls,
        task: EvaluationTask,
        questions: Sequence[Question],
        answers: Sequence[Sequence[ModelAnswer]],
    ) -> TaskResult:
        """The result of answers to the questions of a task."""
        scores = [
            task.measure(question.item, given)
            for question, given in zip(questions, answers, strict=True)
        ]
        return cls(task, questions, answers, scores)

    def estimate(self, measure: Measure, of: Iterable[int] | None = None) -> Estimate:
        """A measure over all items, or over those with some numbers."""
        numbers = range(len(self.scores)) if of is None else of
        return estimated(measure, [self.scores[n][measure.name] for n in numbers])

    def subjects(self) -> dict[str, list[int]]:
        """Numbers of the items of each subject; empty where there is one alone."""
        return self._parts([question.item.subject for question in self.questions])

    def groups(self) -> dict[str, list[int]]:
        """Numbers of the items of each group of subjects; empty where there is one alone."""
        return self._parts([self.task.group(q.item.subject) for q in self.questions])

    @property
    def cut(self) -> int:
        """Number of items of which the model could not read all on the left."""
        return sum(any(answer.cut for answer in given) for given in self.answers)

    @property
    def chooses(self) -> bool:
        """Returns whether the likeliest choice counts, with a likelihood for each of several.

        A task may ask for more likelihoods, which stand behind these.
        """
        items = [question.item for question in self.questions]
        return ACCURACY in self.task.measures and all(
            len(given) >= len(item.choices) > 1 and all(isinstance(a, Likelihood) for a in given)
            for item, given in zip(items, self.answers, strict=True)
        )

    def _parts(self, names: Sequence[str]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            found.setdefault(name, []).append(number)
        return found if len(found) > 1 else {}


def estimated(measure: Measure, values: Sequence[float | tuple[float, ...]]) -> Estimate:
    """A number from those of items.

    The interval of shares of items is Wilson's (1927, "Probable inference, the law of succession,
    and statistical inference"), of other means that of the normal distribution, of perplexities,
    rates and measures of a corpus the bootstrap's with one drawing of items for all.
    """
    if measure.kind == "mean":
        return _mean(np.array(values, float))
    array = np.array(values, float).reshape(len(values), -1)
    value = combined(measure, array.sum(axis=0), len(array))
    if len(array) < 2:
        return Estimate(value, math.nan, math.nan, math.nan, len(array))
    counts = np.random.default_rng(0).multinomial(
        len(array), np.full(len(array), 1 / len(array)), RESAMPLES
    )
    drawn = np.array([combined(measure, total, len(array)) for total in counts @ array])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(drawn.std(ddof=1)), float(low), float(high), len(array))


def _mean(values: np.ndarray) -> Estimate:
    count, mean = len(values), float(values.mean())
    if count < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, count)
    error = float(values.std(ddof=1)) / math.sqrt(count)
    if not np.isin(values, (0.0, 1.0)).all():
        return Estimate(mean, error, mean - NORMAL * error, mean + NORMAL * error, count)
    ratio = NORMAL**2 / count
    middle = (mean + ratio / 2) / (1 + ratio)
    half = NORMAL * math.sqrt(mean * (1 - mean) / count + ratio / (4 * count)) / (1 + ratio)
    return Estimate(mean, error, max(0.0, middle - half), min(1.0, middle + half), count)


def combined(measure: Measure, totals: np.ndarray, count: int | float) -> float:
    """A number that is no mean, from the sums over so many items; infinity: more than floats hold.

    Args:
      measure: the number.
      totals: sum of what each item gives.
      count: of the items.
    """
    if measure.of is not None:
        return measure.of(totals)
    if measure.kind == "perplexity":
        return _exponential(-totals[0] / count)
    nats = -totals[0] / totals[1]
    return float(nats / math.log(2)) if measure.name.startswith("bits") else _exponential(nats)


def _exponential(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def row_name(result: TaskResult, measure: Measure) -> str:
    """Task, examples and measure, as tables name them."""
    shots = max((question.shots for question in result.questions), default=0)
    return f"{result.task.name} {shots}-shot {measure.name}"


def guessing(task: EvaluationTask, questions: Sequence[Question]) -> dict[str, float]:
    """Expected scores of a model that guesses; without those that have none."""
    return _means([task.chance(question.item) for question in questions])


def answered(task: EvaluationTask, questions: Sequence[Question]) -> dict[str, float]:
    """Scores of people over the items that several of them answered; empty where none have."""
    return _means([scores for q in questions if (scores := task.people(q.item))])


def by_length(task: EvaluationTask, questions: Sequence[Question]) -> dict[str, float]:
    """Scores of a model to which every character is as likely: it knows lengths alone."""

    def answer(request: ModelRequest) -> Likelihood | None:
        if not isinstance(request, ContinuationRequest):
            return None
        length = len(request.context) + len(request.continuation)
        return Likelihood(-float(length), False, 1)

    found = []
    for question in questions:
        answers = [answer(request) for request in question.requests]
        if not question.item.choices or None in answers:
            return {}
        scores = task.measure(question.item, answers)
        found.append({name: scores[name] for name in task.chance(question.item)})
    return _means(found)


def _means(scores: Sequence[ItemScores]) -> dict[str, float]:
    names = scores[0] if scores else ()
    return {name: float(np.mean([one[name] for one in scores])) for name in names}
