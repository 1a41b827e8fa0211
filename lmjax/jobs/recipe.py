"""Recipes, and batch sizes that grow; `lmjax.jobs.recipes` has the recipes of papers."""

import itertools
from collections.abc import Sequence
from typing import Literal

from lmjax.config import config, replace
from lmjax.data import Data
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation, Log
from lmjax.models import TransformerConfig
from lmjax.objectives import CausalLM, Objective
from lmjax.training.optimizers import AdamW, Optimizer
from lmjax.training.schedules import Schedule

ADAMW = AdamW(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1)
Growth = tuple[tuple[int, int], ...]  # (step, rows from there on)


@config
class Recipe:
    """Settings that an experiment takes from a paper; fields as in `Pretrain` and its `Data`."""

    model: TransformerConfig
    length: int  # tokens that the model reads in a row
    batch_size: int  # rows in a step
    ramp: tuple[tuple[int, int], ...] = ()  # changes of batch_size: (step, rows from there on)
    steps: int  # updates of the parameters
    schedule: Schedule
    schedule_counts: Literal["steps", "full batches"] = "steps"  # as in Pretrain
    optimizer: Optimizer = ADAMW
    gradient_clip: float | None = 1.0  # largest norm of the gradient; None: no limit
    # (step, factor), ...: what the gradient of token embeddings is multiplied by
    embedding_gradient: tuple[tuple[int, float], ...] = ()
    objective: Objective = CausalLM()

    def experiment(self, data: Data, **settings) -> Pretrain:
        """The experiment that trains so.

        Args:
          data: the text and its tokenizer; lengths and batches are the recipe's.
          settings: further fields of `Pretrain`, for instance output and mesh.
        """
        regular = {
            "evaluation": Evaluation(every=1000, tokens=4_000_000),
            "checkpoint": Checkpoints(every=500, keep_every=10_000),
            "log": Log(every=10),
        }
        return Pretrain(
            steps=self.steps,
            # A layer's input is all that is kept of it: models so large leave room for no more.
            model=replace(self.model, dtype="bfloat16", remat="full"),
            objective=self.objective,
            data=replace(data, length=self.length, batch_size=self.batch_size, ramp=self.ramp),
            optimizer=self.optimizer,
            schedule=self.schedule,
            schedule_counts=self.schedule_counts,
            gradient_clip=self.gradient_clip,
            embedding_gradient=self.embedding_gradient,
            **regular | settings,
        )


def grow(sizes: Sequence[int], over: float | int) -> Growth:
    """Steps at which a batch takes its sizes: each where a line from first to last reaches it.

    Args:
      sizes: rows of a step, rising.
      over: rows of data over which the batch grows.
    """
    first, full = sizes[0], sizes[-1]
    table, step, done = [(0, first)], 0, 0
    for before, size in itertools.pairwise(sizes):
        steps = max(0, -int(-(over * (size - first) / (full - first) - done) // before))
        step, done = step + steps, done + steps * before
        table.append((step, size))
    return tuple(table)


def doublings(first: int, full: int) -> list[int]:
    """`first`, doubled as long as it stays below `full`, and `full`."""
    doubled = itertools.takewhile(lambda rows: rows < full, (first << k for k in range(32)))
    return [*doubled, full]


def steps_for(tokens: float | int, length: int, table: Growth) -> int:
    """Steps until so many tokens have been trained on, while the batch grows by the table."""
    rows = tokens / length
    for (step, size), (end, _) in itertools.pairwise(table):
        rows -= (end - step) * size
    step, size = table[-1]
    return step - int(-rows // size)
