"""Mean of four tasks by which the first Open LLM Leaderboard ordered models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lmjax.console import Table
from lmjax.evaluation.reference_scores import names_of_set
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.tasks.arc import Arc
from lmjax.evaluation.tasks.hellaswag import HellaSwag
from lmjax.evaluation.tasks.mmlu import GROUP_OF, MMLU
from lmjax.evaluation.tasks.truthfulqa import TruthfulQA2

# Task, number of examples in the prompt, measure. MMLU's score is the mean of its subjects'.
FOUR = (
    (Arc, 25, "acc_norm"),
    (HellaSwag, 10, "acc_norm"),
    (MMLU, 5, "acc"),
    (TruthfulQA2, 0, "mc2"),
)
CAPTION = (
    "ARC's challenge set with 25 examples in the prompt, HellaSwag with "
    "10, MMLU with 5 and TruthfulQA with those of its own prompt: acc_norm, acc_norm, the mean of "
    "acc over the 57 subjects, MC2; and their mean, in percent."
)


def leaderboard_table(results: Mapping[str, Sequence[TaskResult]]) -> Table | None:
    """The four scores of models (by name) and their mean; None where they are not all there.

    A task with a limit, or with other numbers of examples, is not the leaderboard's, nor is a file
    of ARC that does not say that it is of the challenge set.
    """
    rows = []
    for kind, shots, measure in FOUR:
        numbers = [
            number
            for number, result in enumerate(next(iter(results.values())))
            if type(result.task) is kind and _is_whole(result, shots)
        ]
        if len(numbers) != 1:
            return None
        [number] = numbers
        scores = [100 * _score(found[number], measure) for found in results.values()]
        rows.append((f"{kind.__name__} {shots}-shot {measure}", *scores))
    means = np.mean([row[1:] for row in rows], axis=0)
    rows.append(("mean", *map(float, means)))
    return Table("Leaderboard", ("task", *results), tuple(rows), CAPTION, True)


def _is_whole(result: TaskResult, shots: int) -> bool:
    """Returns whether all items of the leaderboard's set were asked with so many examples."""
    task = result.task
    subjects = {question.item.subject for question in result.questions}
    all_there = not isinstance(task, MMLU) or subjects == GROUP_OF.keys()
    challenge = not isinstance(task, Arc) or "challenge" in names_of_set(task)
    return task.shots == shots and task.limit is None and all_there and challenge


def _score(result: TaskResult, name: str) -> float:
    """A score over all items; where there are subjects, the mean of theirs."""
    measure = next(one for one in result.task.measures if one.name == name)
    parts = result.subjects().values() or [range(len(result.questions))]
    return float(np.mean([result.estimate(measure, part).value for part in parts]))
