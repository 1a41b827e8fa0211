"""Evaluators: measures and samples that a training run takes of its model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from lmjax.config import UserError, config
from lmjax.console import RunLog, Table
from lmjax.objectives import Example, Sums
from lmjax.training.feed import Feed
from lmjax.training.learner import Learner

Record = dict[str, Any]  # one line of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Context:
    """Parts of a run that an evaluator can use.

    Attributes:
      learner: the model with its loss.
      feed: the training data.
      records: () -> the lines of metrics.jsonl so far, in the run's first process.
      log: for warnings and progress.
      frozen: parameters of the models that the objective reads beside the trained one, by name.
    """

    learner: Learner
    feed: Feed
    records: Callable[[], list[Record]]
    log: RunLog
    frozen: dict[str, dict] | None = None

    def sums(self, params: dict, example: Example) -> Sums:
        """Sums of the loss of an example that is on the devices, without dropout; compiled."""
        given = (params, example, self.frozen) if self.learner.frozen else (params, example)
        return self.learner.compiled_evaluate(*given)


# (steps done, parameters) -> lines of metrics.jsonl, each with its "split", and tables.
Evaluate = Callable[[int, dict], tuple[Record | Table, ...]]


@config
class Evaluator(abc.ABC):
    """Base of the evaluators: a config whose `prepare` gives the function that evaluates.

    The function is called in all processes of a run, since its computations may be spread over
    them. What it returns in the first one counts.
    """

    every: int | None = None  # steps between evaluations; None: at the end of the run alone

    def validate(self) -> None:
        """Raises UserError for an interval that is none."""
        if self.every is not None and self.every < 1:
            raise UserError(f"every={self.every}: it must be at least 1, or none")

    @property
    def name(self) -> str:
        """Name of the evaluator in messages."""
        return type(self).__name__

    @abc.abstractmethod
    def prepare(self, context: Context) -> Evaluate:
        """Prepares before the first step all that the evaluations need.

        Raises:
          UserError: the evaluation cannot be done with this model or this data.
        """

    def is_due(self, step: int, last: bool) -> bool:
        """Returns whether the interval, if there is one, ends after `step` steps, or the run."""
        return self.every is not None and (last or step % self.every == 0)
