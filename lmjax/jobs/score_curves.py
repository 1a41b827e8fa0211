"""Scores over the compute that models were trained with: a skill against size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lmjax.config import UserError
from lmjax.console import Table
from lmjax.evaluation.task_result import TaskResult, row_name
from lmjax.jobs.training_job import TrainingJob
from lmjax.runs.folder import RunFolder

COMPUTE = "training FLOPs, log10"  # the column that names the rows
CAPTION = (
    "Over the FLOPs of training (model FLOPs, see lmjax.scaling.flops, of all tokens that the run "
    "itself read), a row for each model."
)


def training_compute(folder: str) -> float:
    """Model FLOPs that a run was trained with, without those of a model that it began with.

    Raises:
      UserError: the folder is none of a training run, or the run has made no step.
    """
    run = RunFolder(folder)
    job, tokens = run.experiment(), 0
    if isinstance(job, TrainingJob):
        tokens = sum(record.get("tokens", 0) for record in run.metrics() if _is_step(record))
    if not tokens:
        raise UserError(f"over_compute: {folder} is no training run with steps")
    return job.flops_per_token() * tokens


def curve_tables(
    compute: Mapping[str, float], results: Mapping[str, Sequence[TaskResult]]
) -> list[Table]:
    """A table for each measure that tasks share, which the report draws as lines.

    Args:
      compute: of each model, by its name.
      results: of each model in all tasks.
    """
    names = sorted(results, key=compute.__getitem__)
    found: dict[str, list[int]] = {}
    for number, result in enumerate(results[names[0]]):
        for measure in result.task.measures:
            found.setdefault(measure.name, []).append(number)
    tables = []
    for title, numbers in found.items():
        columns, lines = [COMPUTE], []
        for number in numbers:
            task = results[names[0]][number]
            measure = next(m for m in task.task.measures if m.name == title)
            columns.append(row_name(task, measure).removesuffix(f" {title}"))
            lines.append([results[name][number].estimate(measure).value for name in names])
        logs = [f"{math.log10(compute[name]):.3f}" for name in names]
        rows = tuple(zip(logs, *lines, strict=True))
        notes = tuple(f"{log}: {name}" for log, name in zip(logs, names, strict=True))
        heading = f"{title} over compute"
        tables.append(Table(heading, tuple(columns), rows, CAPTION, notes=notes, picture="lines"))
    return tables


def _is_step(record: Mapping) -> bool:
    return record["split"] == "train"
