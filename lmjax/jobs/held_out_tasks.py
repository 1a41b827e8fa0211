"""Held-out sets of several runs, on which any of their models is scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.console import RunLog, Table
from lmjax.data import Data
from lmjax.evaluation.held_out import HeldOut, Score
from lmjax.evaluation.transfer import ScoreMatrix
from lmjax.interop.folder import model_folder, read_params
from lmjax.jobs.run_text import read_text, text_of_run
from lmjax.models import TransformerConfig, abstract
from lmjax.objectives import Example, Sums, TextObjective
from lmjax.parallel import Layout, training_layout

# What a score is of -> whether more of it is better.
MEASURES = {"Accuracy": True, "Bits per byte": False, "Nats per predicted token": False}


@dataclasses.dataclass(frozen=True)
class HeldOutTask:
    """The held-out sets that a run was the first to train for.

    Attributes:
      stage: number of the run among all.
      data: its text.
      objective: what it was trained to do.
      names: of the sets.
    """

    stage: int
    data: Data
    objective: TextObjective
    names: tuple[str, ...]


def tasks_of(runs: Sequence[str]) -> tuple[HeldOutTask, ...]:
    """The tasks of runs that were trained one after another.

    A set belongs to the first run that has a domain of its name in data.train: later ones replay
    it. Runs that do not know their text, and public model folders, have no task.

    Raises:
      UserError: one of them is no such folder.
    """
    found, known = [], set()
    for stage, folder in enumerate(runs):
        if (text := text_of_run(folder)) is None:
            continue
        names = tuple(d.name for d in text[0].train if d.name not in known)
        known.update(names)
        if names:
            found.append(HeldOutTask(stage, *text, names))
    return tuple(found)


def starting_model(folder: str) -> tuple[TransformerConfig, dict]:
    """The model in a folder, adapters merged; a mesh is set."""
    model = replace(model_folder(folder), lora=None)
    return model, read_params(folder, model, training_layout())


def score_on(
    tasks: Sequence[HeldOutTask],
    model: TransformerConfig,
    params: dict,
    folder: str,
    tokens: int | None,
    log: RunLog,
) -> dict[str, Score]:
    """Scores of a model on the held-out sets of all tasks that it can do, by set.

    Args:
      tasks: see `tasks_of`.
      model: config of the model.
      params: of the model; a mesh is set.
      folder: run folder or public model folder with its tokenizer.
      tokens: about how many tokens of each set to score; None: all.
      log: for warnings and progress.

    Raises:
      UserError: the text cannot be read.
    """
    layout, found = training_layout(), {}
    for task in tasks:
        try:
            task.objective.check(model)
        except UserError:
            continue  # it has no head for it, for instance
        feed = read_text(task.data, task.objective, folder, model, log)
        sets = HeldOut.of_feed(feed, layout, model.vocab_size, tokens)
        stores = {name: sets.stores[name] for name in task.names if name in sets.stores}
        evaluate = _evaluation(model, task.objective, layout)
        found |= dataclasses.replace(sets, stores=stores).score(evaluate, params)
    return found


@functools.lru_cache(maxsize=16)
def _evaluation(
    model: TransformerConfig, objective: TextObjective, layout: Layout
) -> Callable[[dict, Example], Sums]:
    """Sums of the loss of an example, without dropout; compiled once for a model and an objective.

    The mesh that is set must be the same in all calls.
    """
    graph, _ = abstract(model, layout)

    def evaluate(params: dict, example: Example) -> Sums:
        return objective.loss(nnx.merge(graph, params), objective.normalise(example), None)

    return jax.jit(evaluate)


def measured(score: Score | None) -> tuple[str, float] | None:
    """Name and value of the number that a set is compared by."""
    if score is None:
        return None
    if "accuracy" in score.measures:
        return "Accuracy", score.measures["accuracy"]
    if score.bits_per_byte is not None:
        return "Bits per byte", score.bits_per_byte
    return "Nats per predicted token", score.loss


def score_tables(scores: dict[str, dict[str, Score]], caption: str) -> list[Table]:
    """One table for each kind of number: a line for each set, a column for each model.

    Args:
      scores: of each model by its name, by set.
      caption: of all tables.
    """
    sets = dict.fromkeys(name for found in scores.values() for name in found)
    tables = []
    for kind, more_is_better in MEASURES.items():
        rows = []
        for name in sets:
            cells = [measured(found.get(name)) for found in scores.values()]
            if kind in {cell[0] for cell in cells if cell is not None}:
                rows.append((name, *(cell and cell[1] for cell in cells)))
        if rows:
            columns = ("held-out set", *scores)
            tables.append(Table(kind, columns, tuple(rows), caption, more_is_better))
    return tables


def matrix_of(table: Table, tasks: Sequence[HeldOutTask]) -> ScoreMatrix:
    """The scores of a table whose first column is of random parameters, the others of stages."""
    stages = {name: task.stage for task in tasks for name in task.names}
    values = np.array([row[1:] for row in table.rows], np.float64)  # None becomes NaN
    learnt = tuple(stages[row[0]] for row in table.rows)
    return ScoreMatrix(values[:, 1:].T, learnt, values[:, 0], table.more_is_better)
