"""Scores of people, and published scores of public models, to stand beside those of a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lmjax.config import UserError
from lmjax.console import Cell, Table
from lmjax.evaluation.task_result import TaskResult, answered, row_name
from lmjax.evaluation.tasks.task import EvaluationTask, Measure


class Reference(NamedTuple):
    """A score that was published.

    Attributes:
      task: name of the task's class.
      measure: of the task.
      score: the number.
      shots: examples in the prompt; None: it had no prompt.
      of: regular expression that is found in the title or the path of the test set, in lower case:
        one class reads several sets.
      version: of the task; empty: any.
    """

    task: str
    measure: str
    score: float
    shots: int | None = None
    of: str = ""
    version: str = ""


class Publication(NamedTuple):
    """A paper with scores of a model."""

    paper: str
    scores: tuple[Reference, ...]


def _llama(paper: str, zero_shot: tuple[float, ...], mmlu: float) -> Publication:
    """Percents of LLaMA's table of common sense, in the order of its columns, and of MMLU."""
    names = (
        *(("BoolQ", "acc", ""), ("PIQA", "acc_norm", ""), ("HellaSwag", "acc_norm", "")),
        *(("WinoGrande", "acc", ""), ("Arc", "acc_norm", "easy"), ("Arc", "acc_norm", "challenge")),
    )
    scores = tuple(
        Reference(task, measure, _share(score), 0, of)
        for (task, measure, of), score in zip(names, zero_shot, strict=True)
    )
    return Publication(paper, (*scores, Reference("MMLU", "acc", _share(mmlu), 5)))


def _gpt2(accuracy: float, perplexity: float) -> Publication:
    """Percents of LAMBADA's last words, and their perplexity."""
    scores = ("acc", _share(accuracy)), ("perplexity", perplexity)
    return Publication(GPT2, tuple(Reference("Lambada", *one, 0) for one in scores))


def _squad(measure: str, score: float, version: str) -> Reference:
    """A score in one version of SQuAD, with the rules of that version."""
    return Reference("SQuAD", measure, score, of=SQUAD.format(re.escape(version)), version=version)


def _share(percent: float) -> float:
    return round(percent / 100, 4)


GPT2 = "Radford et al. 2019, table 3"
LLAMA = "Touvron et al. 2023, arXiv:2302.13971, tables 3 and 9"
LLAMA2 = "Touvron et al. 2023, arXiv:2307.09288, tables 3 and 20"
MISTRAL = "Jiang et al. 2023, arXiv:2310.06825, table 2"
PUBLISHED: Mapping[str, Publication] = {
    "GPT-2 124M": _gpt2(45.99, 35.13),
    "GPT-2 355M": _gpt2(55.48, 15.60),
    "GPT-2 774M": _gpt2(60.12, 10.87),
    "GPT-2 1.5B": _gpt2(63.24, 8.63),
    "LLaMA 7B": _llama(LLAMA, (76.5, 79.8, 76.1, 70.1, 72.8, 47.6), 35.1),
    "LLaMA 13B": _llama(LLAMA, (78.1, 80.1, 79.2, 73.0, 74.8, 52.7), 46.9),
    "LLaMA 33B": _llama(LLAMA, (83.1, 82.3, 82.8, 76.0, 80.0, 57.8), 57.8),
    "LLaMA 65B": _llama(LLAMA, (85.3, 82.8, 84.2, 77.0, 78.9, 56.0), 63.4),
    "LLaMA 2 7B": _llama(LLAMA2, (77.4, 78.8, 77.2, 69.2, 75.2, 45.9), 45.3),
    "LLaMA 2 13B": _llama(LLAMA2, (81.7, 80.5, 80.7, 72.8, 77.3, 49.4), 54.8),
    "LLaMA 2 70B": _llama(LLAMA2, (85.0, 82.8, 85.3, 80.2, 80.2, 57.4), 68.9),
    "Mistral 7B": Publication(
        MISTRAL,
        (
            Reference("HellaSwag", "acc_norm", 0.813, 0),
            Reference("PIQA", "acc_norm", 0.830, 0),
            Reference("WinoGrande", "acc", 0.753, 0),
            Reference("Arc", "acc_norm", 0.800, 0, "easy"),
            Reference("Arc", "acc_norm", 0.555, 0, "challenge"),
            Reference("MMLU", "acc", 0.601, 5),
        ),
    ),
}
# By name of file at its authors', or in TensorFlow Datasets.
SQUAD = r"(?:^|[/: ])(?:(?:dev|train|test)-|squad/)v{}"
# Each in the paper of its test set: Hendrycks et al. 2020 (an estimate of experts), Zellers et al.
# 2019, Bisk et al. 2019, Sakaguchi et al. 2019, Clark et al. 2019, Reddy et al. 2019 (abstract).
# Those of SQuAD stand on its leaderboard; the paper of 1.1 (Rajpurkar et al. 2016) has an exact
# match of 77.0 and an F1 of 86.8.
PEOPLE = (
    Reference("MMLU", "acc", 0.898),
    *(Reference("HellaSwag", measure, 0.956) for measure in ("acc", "acc_norm")),
    *(Reference("PIQA", measure, 0.949) for measure in ("acc", "acc_norm")),
    Reference("WinoGrande", "acc", 0.940),
    Reference("BoolQ", "acc", 0.90),
    _squad("exact_match", 0.823, "1.1"),
    _squad("f1", 0.912, "1.1"),
    _squad("exact_match", 0.868, "2.0"),
    _squad("f1", 0.895, "2.0"),
    Reference("CoQA", "f1", 0.888),
)
WORDS = (
    "What people reached, by their answers in the test set or else by its paper, and published "
    "models, by theirs, where task, measure and number of examples are the same. Prompts and parts "
    "of the sets may differ: a score that is compared is measured by oneself."
)


def check_published(names: Sequence[str]) -> None:
    """Raises UserError for a model of which no scores are known here."""
    for name in names:
        if name not in PUBLISHED:
            near = difflib.get_close_matches(name, PUBLISHED, cutoff=0.4) or list(PUBLISHED)
            raise UserError(
                f"published: no scores of {name!r} are known here; of {', '.join(near)}"
            )


def reference_table(
    results: Mapping[str, Sequence[TaskResult]], published: Sequence[str]
) -> Table | None:
    """Scores of models beside those of people and of published models; None: none are known.

    Args:
      results: of each model in all tasks.
      published: names of `PUBLISHED`.
    """
    rows = []
    for number, result in enumerate(next(iter(results.values()))):
        shots = max((question.shots for question in result.questions), default=0)
        for measure in result.task.measures:
            known = [
                _score(PUBLISHED[name].scores, result.task, measure, shots) for name in published
            ]
            people = answered(result.task, result.questions).get(measure.name)
            if people is None:
                people = _score(PEOPLE, result.task, measure, shots)
            if people is None and not any(known):
                continue
            own = [found[number].estimate(measure).value for found in results.values()]
            rows.append((row_name(result, measure), people, *known, *own))
    if not rows:
        return None
    columns = ("task", "people", *published, *results)
    notes = tuple(f"{name}: {PUBLISHED[name].paper}" for name in published)
    return Table("People and published models", columns, tuple(rows), WORDS, notes=notes)


def _score(scores: Sequence[Reference], task: EvaluationTask, measure: Measure, shots: int) -> Cell:
    """The score of a task among some; None: there is none."""
    if getattr(task, "subjects", ()):
        return None  # of a part alone
    name, title = type(task).__name__, names_of_set(task)
    for one in scores:
        is_same = (one.task, one.measure) == (name, measure.name) and re.search(one.of, title)
        fits = one.shots in (None, shots) and one.version in ("", getattr(task, "version", ""))
        if is_same and fits:
            return one.score
    return None


def names_of_set(task: EvaluationTask) -> str:
    """Title of a task and the end of its path, in lower case: what they say of the test set."""
    path = "/".join(task.path.split("/")[-3:])  # of tfds: name, set and split
    return f"{task.title} {path}".lower()
