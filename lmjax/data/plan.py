"""The data plan: the small table from which the rows of every step follow."""

import numpy as np
from jaxtyping import Int64

from lmjax.config import UserError, config, replace


@config
class PlanRow:
    """From `first_step` on, steps take `batch_size` rows each, beginning with `first_row`."""

    first_step: int  # 0-based step from which this row of the table holds
    first_row: int  # row of the data that this step begins with
    batch_size: int  # rows a step

    def validate(self) -> None:
        if self.first_step < 0 or self.first_row < 0 or self.batch_size < 1:
            raise UserError(
                f"a data plan needs steps and rows from 0 and batches of at least 1 row, got "
                f"first_step={self.first_step}, first_row={self.first_row}, "
                f"batch_size={self.batch_size}"
            )


@config
class Plan:
    """The rows of each step. Immutable; changes make a new plan with one row more."""

    seed: int = 0  # of the shuffling
    table: tuple[PlanRow, ...]  # batch sizes, by rising first step
    skipped: tuple[tuple[int, int], ...] = ()  # ranges of rows to leave out: (first, one past last)

    def validate(self) -> None:
        steps = [row.first_step for row in self.table]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise UserError(f"the steps of a data plan must rise from 0, got {steps}")
        edges = [edge for piece in self.skipped for edge in piece]
        if edges != sorted(set(edges)):
            raise UserError(f"skipped ranges must rise and lie apart, got {self.skipped}")

    def at(self, step: int) -> PlanRow:
        """The row of the table that holds for a step."""
        return max(
            (row for row in self.table if row.first_step <= step), key=lambda row: row.first_step
        )

    def batch_size(self, step: int) -> int:
        """Rows of a step."""
        return self.at(step).batch_size

    def row0(self, step: int) -> int:
        """Number of rows trained on before a step: ranges to skip are not counted."""
        row = self.at(step)
        return row.first_row + (step - row.first_step) * row.batch_size

    def rows(self, step: int) -> Int64[np.ndarray, "batch_size"]:
        """The numbers of a step's rows in the mixture."""
        first = self.row0(step)
        rows = np.arange(first, first + self.batch_size(step))
        for begin, end in self.skipped:
            rows = np.where(rows >= begin, rows + (end - begin), rows)
        return rows

    def with_batch_size(self, step: int, batch_size: int) -> "Plan":
        """The plan with another batch size from `step` on; the order of rows stays."""
        kept = tuple(row for row in self.table if row.first_step < step)
        new = PlanRow(first_step=step, first_row=self.row0(step), batch_size=batch_size)
        return replace(self, table=(*kept, new))

    def skipping(self, first_step: int, last_step: int) -> "Plan":
        """The plan that leaves out what `first_step` to `last_step`, both included, train on.

        `first_step` then trains on what would have come after `last_step`. A run goes back to a
        checkpoint from before a loss spike and goes on with this plan.
        """
        if last_step < first_step:
            raise UserError(f"cannot skip steps {first_step} to {last_step}: the last comes first")
        begin, end = int(self.rows(first_step)[0]), int(self.rows(last_step)[-1]) + 1
        pieces = [*self.skipped]
        inside = [piece for piece in pieces if begin <= piece[0] < end]
        pieces = sorted([*(piece for piece in pieces if piece not in inside), (begin, end)])
        joined: list[tuple[int, int]] = []
        for piece in pieces:
            if joined and joined[-1][1] == piece[0]:
                joined[-1] = (joined[-1][0], piece[1])
            else:
                joined.append(piece)
        return replace(self, skipped=tuple(joined))


def make_plan(seed: int, batch_size: int, ramp: tuple[tuple[int, int], ...] = ()) -> Plan:
    """A plan from the first step.

    Args:
        seed: of the shuffling.
        batch_size: rows a step.
        ramp: changes of it, as (step, rows from that step on).
    """
    plan = Plan(seed=seed, table=(PlanRow(first_step=0, first_row=0, batch_size=batch_size),))
    for step, size in sorted(ramp):
        plan = plan.with_batch_size(step, size)
    return plan
