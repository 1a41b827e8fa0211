"""The best parameters of a run by a measure of held-out data, and the end of a run without better.

Nothing of it is in the state that is trained: the choice is a function of the evaluations alone, so
that a run which is killed and goes on keeps its count and stops at the same step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from lmjax.config import UserError, config
from lmjax.console import Table
from lmjax.evaluation.held_out import HELD_OUT
from lmjax.launch import from_first, on_first
from lmjax.runs.checkpoints import BEST

LOWER = "loss", "bits_per_byte"  # measures of which it is known that less is better


@config
class BestCheckpoint:
    """The checkpoint with the best measure of all evaluations: it stays, and is the run's model."""

    measure: str = "loss"  # its name in the lines of metrics.jsonl that evaluators write
    data: str | None = None  # the held-out set that counts; none: the mean of all with the measure
    better: Literal["lower", "higher"] | None = None  # none: lower, for loss and bits_per_byte
    # evaluations in a row without a better one after which training ends early; none: it does not
    patience: int | None = None

    def validate(self) -> None:
        """Raises UserError for a measure of unknown direction, or no patience at all."""
        if self.better is None and self.measure not in LOWER:
            raise UserError(
                f"best.measure={self.measure}: say with best.better whether lower or higher is"
                " better"
            )
        if self.patience is not None and self.patience < 1:
            raise UserError(f"best.patience={self.patience}: it must be at least 1, or none")

    @property
    def words(self) -> str:
        """The choice in words, as "lowest loss on held-out talk"."""
        extreme = "highest" if self.better == "higher" else "lowest"
        return f"{extreme} {self.measure.replace('_', ' ')} on held-out {self.data or 'data'}"

    def is_better(self, value: float, than: float) -> bool:
        """Returns whether a value is strictly better than another; NaN never is."""
        return value > than if self.better == "higher" else value < than

    def value_of(self, records: Iterable[Mapping[str, Any]]) -> float | None:
        """The measure among the lines of one evaluation; None where no held-out set was measured.

        Raises:
          UserError: held-out sets were measured, but none that counts has the measure.
        """
        found = {
            record["split"].removeprefix(HELD_OUT): record
            for record in records
            if record["split"].startswith(HELD_OUT)
        }
        values = [
            float(record[self.measure])
            for name, record in found.items()
            if self.data in (None, name) and isinstance(record.get(self.measure), int | float)
        ]
        if found and not values:
            there = "; ".join(
                f"{name}: {', '.join(key for key in line if isinstance(line[key], float))}"
                for name, line in found.items()
            )
            where = "" if self.data is None else f" data={self.data}"
            raise UserError(
                f"checkpoint.best: no evaluation gives measure={self.measure}{where}; there are"
                f" {there}"
            )
        return sum(values) / len(values) if values else None


@dataclasses.dataclass(frozen=True)
class BestSoFar:
    """The best evaluation of a run, and those since.

    Attributes:
      step: updates before it.
      value: of the measure.
      since: evaluations after it.
    """

    step: int
    value: float
    since: int = 0


class Selection:
    """The best evaluation so far, in every process of a run; see `BestCheckpoint`."""

    def __init__(
        self, settings: BestCheckpoint | None, saved: Mapping[str, Any], steps: Iterable[int]
    ) -> None:
        """Goes on from a checkpoint.

        Args:
          settings: None: nothing is chosen.
          saved: JSON values beside its arrays; empty at the beginning of a run.
          steps: of the checkpoints that there are. Where the best one was lost, or was chosen by
            another measure, the choice begins anew.
        """
        self.settings, self.best = settings, None
        before = saved.get(BEST)
        if settings is not None and before is not None and before["by"] == self._by:
            found = BestSoFar(before["step"], before["value"], before["since"])
            self.best = found if found.step in steps else None

    def update(self, step: int, records: Iterable[Mapping[str, Any]]) -> bool:
        """Takes the evaluation after a step; returns whether it is the best so far.

        Raises:
          UserError: see `BestCheckpoint.value_of`.
        """
        if self.settings is None:
            return False
        value = _of_first_process(lambda: self.settings.value_of(records))
        if value is None:
            return False
        if self.best is None:
            is_best = not math.isnan(value)
        else:
            is_best = self.settings.is_better(value, self.best.value)
        if is_best:
            self.best = BestSoFar(step, value)
        elif self.best is not None:
            self.best = dataclasses.replace(self.best, since=self.best.since + 1)
        return is_best

    @property
    def is_over(self) -> bool:
        """Returns whether patience has run out."""
        if self.best is None or self.settings.patience is None:
            return False
        return self.best.since >= self.settings.patience

    def tables(self) -> tuple[Table, ...]:
        """The best evaluation as a table of the report; none where nothing is chosen."""
        if self.best is None:
            return ()
        end = ""
        if self.is_over:
            end = f" Training ended after {self.best.since} evaluations without a better one."
        return (
            Table(
                "Best checkpoint",
                ("checkpoint", self.settings.measure.replace("_", " ")),
                ((f"step {self.best.step:,}", self.best.value),),
                f"The {self.settings.words}; what is loaded of this run, and what the other results"
                f" of its end are of.{end}",
            ),
        )

    @property
    def extra(self) -> dict[str, Any]:
        """JSON that a checkpoint keeps of the choice."""
        if self.best is None:
            return {}
        return {BEST: {"by": self._by, **dataclasses.asdict(self.best)}}

    @property
    def _by(self) -> list[str | None]:
        return [self.settings.measure, self.settings.data, self.settings.better]


def _of_first_process(find: Callable[[], float | None]) -> float | None:
    """A number of the run's first process, whose evaluations count, in all of them.

    Raises:
      UserError: the first process cannot find it.
    """
    mine = np.full(2, np.nan)

    def look() -> None:
        if (found := find()) is not None:
            mine[:] = found, 1.0

    on_first(look)
    value, there = from_first(mine)
    return None if math.isnan(there) else float(value)
