"""Tables of the scores of models in tasks, for terminal, results.json and report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lmjax.console import Cell, Table
from lmjax.evaluation.calibration import Reliability, choice_confidence, reliability
from lmjax.evaluation.requests import Likelihood, Written
from lmjax.evaluation.task_result import TaskResult, by_length, guessing, row_name
from lmjax.evaluation.tasks.choices import ACCURACY
from lmjax.evaluation.tasks.task import Question

ERRORS = 3  # examples of wrong answers, of each task
ALL = "all items"
SCORES = (
    "Each score with its task, number of examples in the prompt and measure. Guessing: what a "
    "model would get that knows nothing; by length: one to which every character is as likely."
)

CALIBRATION = (
    "Expected calibration error: how far the probability of the chosen answer, among all choices "
    "of its question, is from the share of right ones, over ten bins. Of few items it is above 0 "
    "for a calibrated model too."
)


def score_table(results: Mapping[str, Sequence[TaskResult]], more_is_better: bool) -> Table | None:
    """The scores of models (by name) where more is better, or those where less is."""
    first = next(iter(results.values()))
    rows = []
    for number, result in enumerate(first):
        wanted = [
            m for m in result.task.measures if (m.more_is_better is not False) == more_is_better
        ]
        guess = guessing(result.task, result.questions)
        short = by_length(result.task, result.questions)
        for measure in wanted:
            values = [one[number].estimate(measure).value for one in results.values()]
            name = row_name(result, measure)
            rows.append((name, guess.get(measure.name), short.get(measure.name), *values))
    if not rows:
        return None
    columns = "task", "guessing", "by length", *results
    notes = cut_notes(results) + left_out_notes(first)
    title = "Scores" if more_is_better else "Perplexities and differences"
    return Table(title, columns, tuple(rows), SCORES, more_is_better, notes)


def cut_notes(results: Mapping[str, Sequence[TaskResult]]) -> tuple[str, ...]:
    """Remarks on items that did not fit into the context of a model."""
    return tuple(
        f"{name}, {result.task.name}: {result.cut:,} of {len(result.questions):,} items were cut "
        "on the left, as they are longer than the model's context"
        for name, found in results.items()
        for result in found
        if result.cut
    )


def left_out_notes(results: Sequence[TaskResult]) -> tuple[str, ...]:
    """Remarks on records that a task cannot ask."""
    counts = {result.task.name: result.task.left_out() for result in results}
    return tuple(
        f"{name}: records of the file that it cannot ask, and leaves out: {count:,}"
        for name, count in counts.items()
        if count
    )


def interval_table(model: str, results: Sequence[TaskResult]) -> Table:
    """Each score of a model with its error, interval and number of items."""
    rows = []
    for result in results:
        for measure in result.task.measures:
            one = result.estimate(measure)
            numbers = (one.error, one.low, one.high, one.value)
            rows.append((row_name(result, measure), one.count, *map(_finite, numbers)))
    columns = ("task", "items", "standard error", "2.5 %", "97.5 %", "score")
    return Table(f"Intervals of {model}", columns, tuple(rows))


def subject_table(number: int, results: Mapping[str, Sequence[TaskResult]]) -> Table | None:
    """The first measure of a task by group and by subject; None where it has no subjects."""
    models = [found[number] for found in results.values()]
    result = models[0]
    parts = {**{f"[{k}]": v for k, v in result.groups().items()}, **result.subjects()}
    if not parts:
        return None
    measure, rows = result.task.measures[0], []
    for name, numbers in {ALL: range(len(result.questions)), **parts}.items():
        values = [_finite(one.estimate(measure, numbers).value) for one in models]
        rows.append((name, len(numbers), *values))
    better = measure.more_is_better
    title = f"{row_name(result, measure)} by subject"
    return Table(title, ("subject", "items", *results), tuple(rows), more_is_better=better)


def prompt_table(results: Sequence[TaskResult]) -> Table:
    """The prompt of one item of each task, with what is scored, stop rule and denominators."""
    rows = tuple((f"{r.task.name}\n", _prompt(r.questions[0], r)) for r in results)
    words = "The first item of each task as the model reads it, character by character."
    return Table("Prompts", ("task", "prompt"), rows, words)


def _prompt(question: Question, result: TaskResult) -> str:
    lines = [f"{question.context}\u23ce" if question.context else "(no context)"]
    for request in question.requests[:8]:
        if hasattr(request, "continuation"):
            lines.append(f"  scored: {request.continuation!r}")
    if rule := result.task.stop_rule():
        lines.append(f"  stops at: {rule}")
    names = ", ".join(measure.name for measure in result.task.measures)
    lines.append(f"  measures: {names}, over {len(result.questions):,} items")
    return "\n".join(lines)


def error_table(model: str, results: Sequence[TaskResult]) -> Table | None:
    """Items that a model got wrong, a few of each task; None where there are none."""
    rows = []
    for result in results:
        wrong = [number for number in range(len(result.scores)) if _is_wrong(result, number)]
        for number in wrong[:ERRORS]:
            item = result.questions[number].item
            asked = f"{result.task.name}, {item.identity}: {item.prompt[-300:]}"
            rows.append((asked, "\n" + _said(result, number)))
    return Table(f"Errors of {model}", ("item", "answer"), tuple(rows)) if rows else None


def _is_wrong(result: TaskResult, number: int) -> bool:
    """Returns whether an answer has nothing right; of a corpus, whether it is another text."""
    name = next((m.name for m in result.task.measures if m.kind == "mean"), None)
    if name is not None:
        return result.scores[number][name] == 0.0
    answers = result.answers[number]
    if not isinstance(answers[0], Written):
        return False
    return answers[0].texts[0].strip() != result.questions[number].item.answer


def calibration_table(results: Mapping[str, Sequence[TaskResult]]) -> Table | None:
    """Expected calibration error of models in tasks whose answers are given; None: there are none.

    A model's confidence is the probability of the likeliest choice among all choices.
    """
    rows = [
        (row_name(first, ACCURACY), *(_reliability(result).error for result in (first, *others)))
        for first, *others in zip(*results.values(), strict=True)
        if first.chooses
    ]
    columns = ("task", *results)
    return Table("Calibration errors", columns, tuple(rows), CALIBRATION, False) if rows else None


def calibration_pictures(model: str, results: Sequence[TaskResult]) -> Table | None:
    """Confidence and share of right answers of a model, by task and bin; None: see above."""
    with_choices = [result for result in results if result.chooses]
    tables = [_reliability(result).table(row_name(result, ACCURACY)) for result in with_choices]
    if not tables:
        return None
    rows = tuple(row for table in tables for row in table.rows)
    return dataclasses.replace(tables[0], title=f"Calibration of {model}", rows=rows)


def _reliability(result: TaskResult) -> Reliability:
    counts = [len(question.item.choices) for question in result.questions]
    values = np.full((len(counts), max(counts)), -np.inf)
    for row, answers, count in zip(values, result.answers, counts, strict=True):
        row[:count] = [answer.log_probability for answer in answers[:count]]
    right = np.array([scores[ACCURACY.name] == 1.0 for scores in result.scores])
    return reliability(choice_confidence(values), right)


def _said(result: TaskResult, number: int) -> str:
    """The right answer, and the model's."""
    item, answers = result.questions[number].item, result.answers[number]
    if isinstance(answers[0], Written):
        return f"wanted: {item.answer!r}\nwritten: {answers[0].texts[0]!r}"
    if not item.choices:
        return f"wanted: {item.answer!r}\nlog-likelihood: {answers[0].log_probability:.3f}"
    lines = []
    for n, (choice, answer) in enumerate(zip(item.choices, answers)):  # more may stand behind
        assert isinstance(answer, Likelihood)
        lines.append(f"{'>' if n == item.gold else ' '} {answer.log_probability:9.3f}  {choice!r}")
    return "\n".join(lines)


def _finite(value: float) -> Cell:
    return value if math.isfinite(value) else None
