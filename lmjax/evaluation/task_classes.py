"""Tasks whose items all have the same choices: macro F1 and confusions of these classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from lmjax.console import Table
from lmjax.evaluation.class_measures import confusion_matrix, confusion_table, macro_f1
from lmjax.evaluation.task_result import TaskResult, row_name
from lmjax.evaluation.tasks.choices import ACCURACY
from lmjax.evaluation.tasks.task import Measure

LARGEST = 12  # most classes whose confusions are shown
MACRO_F1 = Measure("macro_f1")
CAPTION = (
    "Mean F1 of the classes, of tasks whose items all have the same choices; the likeliest choice "
    "counts. Beside it, that of always saying the commonest right answer. Of letters it tells "
    "whether a model prefers some."
)


def classes_of(result: TaskResult) -> tuple[str, ...]:
    """The choices that all items of a task share; empty where they do not, or are none."""
    choices = {question.item.choices for question in result.questions}
    [shared] = choices if len(choices) == 1 else [()]
    return shared if result.chooses and len(set(shared)) == len(shared) else ()


def task_confusion(result: TaskResult) -> Int[np.ndarray, "classes classes"]:
    """Number of items by right (row) and likeliest (column) choice; the task has classes."""
    count = len(result.questions[0].item.choices)
    values = [[answer.log_probability for answer in given[:count]] for given in result.answers]
    labels = np.array([question.item.gold for question in result.questions])
    return confusion_matrix(labels, np.argmax(values, axis=1), count)


def class_tables(results: Mapping[str, Sequence[TaskResult]]) -> list[Table]:
    """Macro F1 of models (by name), and their confusions; none where no task has classes."""
    rows, confusions = [], []
    for number, result in enumerate(next(iter(results.values()))):
        names = classes_of(result)
        if not names:
            continue
        matrices = {name: task_confusion(found[number]) for name, found in results.items()}
        labels = next(iter(matrices.values())).sum(axis=1)
        constant = np.zeros((len(names), len(names)), int)
        constant[:, labels.argmax()] = labels
        scores = map(macro_f1, (constant, *matrices.values()))
        rows.append((row_name(result, MACRO_F1), *scores))
        if len(names) <= LARGEST:
            task = row_name(result, ACCURACY).removesuffix(f" {ACCURACY.name}")
            confusions += [
                confusion_table(matrix, names, f"Confusion of {task}, {name}")
                for name, matrix in matrices.items()
            ]
    if not rows:
        return []
    columns = ("task", "commonest", *results)
    return [Table("Macro F1", columns, tuple(rows), CAPTION, True), *confusions]
