"""Tables of two models on the same items: differences of their scores, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lmjax.console import Cell, Table
from lmjax.evaluation.comparison import mcnemar, paired_bootstrap
from lmjax.evaluation.task_result import TaskResult, combined, row_name
from lmjax.evaluation.tasks.task import Measure

COLUMNS = ("task", "items", "difference", "2.5 %", "97.5 %", "p")
WORDS = (
    "Score of {ours} less that of {theirs} on the same items, with the interval of the paired "
    "bootstrap and the p of the randomization test. Of answers that are right or wrong: items that "
    "one of them alone has right, and the p of McNemar's exact test. Of 20 rows, one has a p below "
    "0.05 where no model is better."
)


def comparison_tables(results: Mapping[str, Sequence[TaskResult]]) -> tuple[Table, ...]:
    """Each further model (by name) beside the first one, on the same tasks; none of one model."""
    first, *others = results
    return tuple(_comparison(name, first, results[name], results[first]) for name in others)


def _comparison(
    name: str, first: str, ours: Sequence[TaskResult], theirs: Sequence[TaskResult]
) -> Table:
    rows = []
    for one, other in zip(ours, theirs, strict=True):
        for measure in one.task.measures:
            both = [[scores[measure.name] for scores in r.scores] for r in (one, other)]
            cells = _differences(measure, *(np.array(values, float) for values in both))
            rows.append((row_name(one, measure), len(one.scores), *cells))
    columns = (*COLUMNS, f"{name} alone", f"{first} alone", "McNemar's p")
    words = WORDS.format(ours=name, theirs=first)
    return Table(f"{name} beside {first}", columns, tuple(rows), words)


def _differences(measure: Measure, ours: np.ndarray, theirs: np.ndarray) -> tuple[Cell, ...]:
    """Difference, ends of its interval, p; items that one alone has right, and p."""
    none: tuple[Cell, ...] = (None,) * 3
    if len(ours) < 2:
        return (None, *none, *none)
    if measure.kind == "mean":
        difference = paired_bootstrap(ours, theirs)
    else:
        # The number of items is summed up with what they give.
        ones = np.ones(len(ours))
        ours, theirs = (np.column_stack([rows, ones]) for rows in (ours, theirs))

        def number(total: np.ndarray) -> float:
            return combined(measure, total[:-1], float(total[-1]))

        if not all(math.isfinite(number(rows.sum(axis=0))) for rows in (ours, theirs)):
            return (None, *none, *none)
        difference = paired_bootstrap(ours, theirs, number)
    cells = tuple(value if math.isfinite(value) else None for value in difference)
    if measure.kind != "mean" or not np.isin([ours, theirs], (0.0, 1.0)).all():
        return (*cells, *none)
    return (*cells, *mcnemar(ours == 1, theirs == 1))
