"""Shows a pipeline schedule as text and as a picture, with its bubble and what stages hold.

python -m lmjax.parallel.show_schedule name=1f1b stages=4 microbatches=8 [picture=FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmjax.config import UserError, config
from lmjax.console import load_pyplot
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.parallel.schedules import Name, PipelineSchedule, Unit, Work, schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@config
class ScheduleCommand:
    """A schedule to show; times are of a microbatch in one part of the model, in any unit."""

    name: Name = "1f1b"  # of the schedule
    stages: int = 4  # of the pipeline
    microbatches: int = 8  # of a step
    chunks: int = 2  # parts of the model on each stage, of interleaved alone
    forward: float = 1.0  # time of a forward pass
    backward: float = 1.0  # time of the gradients of inputs, with what is computed again
    weights: float = 1.0  # time of the gradients of weights
    picture: str = ""  # file to draw into, such as schedule.png

    def validate(self) -> None:
        """Raises UserError for times that there are not."""
        for name in ("forward", "backward", "weights"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: a time is more than 0")


def describe(made: PipelineSchedule, forward: float, backward: float, weights: float) -> str:
    """Text of a schedule: a line for each stage, a column for each tick, and its cost.

    A letter says the work (f forward, b backward, w gradients of weights; capital letters are of
    odd chunks), the number after it the microbatch.
    """

    def cell(unit: Unit) -> str:
        letter = " fbw"[unit.work]
        odd = unit.part // made.stages % 2
        return f"{letter.upper() if odd else letter}{unit.microbatch}"

    cells = [["".join(map(cell, units)) or "." for units in row] for row in made.ticks]
    widths = [max(map(len, row)) for row in cells]
    lines = [
        f"stage {stage}  " + " ".join(row[stage].ljust(width) for row, width in zip(cells, widths))
        for stage in range(made.stages)
    ]
    part = f", each of 1/{made.chunks} of a stage" if made.chunks > 1 else ""
    put_off = f", {max(made.waiting)} of them for gradients of weights alone" if made.split else ""
    return "\n".join(
        [
            *lines,
            "",
            f"ticks       {len(made.ticks)}",
            f"bubble      {made.bubble(forward, backward, weights):.1%} of a step",
            f"held        activations of at most {max(made.live)} microbatches{put_off}{part}",
        ]
    )


def draw(made: PipelineSchedule, forward: float, backward: float, weights: float) -> Figure:
    """Draws a schedule: a row for each stage, time to the right.

    Raises:
      UserError: matplotlib is missing.
    """
    costs = made.costs(forward, backward, weights)
    colours = {Work.FORWARD: "#62a8dc", Work.BACKWARD: "#ee9c32", Work.WEIGHTS: "#86d3b8"}
    width = made.duration(forward, backward, weights) / forward
    size = (2 + 0.22 * width, 1.2 + 0.4 * made.stages)
    figure, axes = load_pyplot().subplots(figsize=size, layout="constrained")
    start = 0.0
    for row in made.ticks:
        for stage, units in enumerate(row):
            at = start
            for unit in units:
                cost, odd = costs[unit.work], unit.part // made.stages % 2
                look = {"color": colours[unit.work], "alpha": 0.6 if odd else 1.0}
                axes.barh(stage, cost, left=at, edgecolor="white", **look)
                number = str(unit.microbatch)
                axes.text(at + cost / 2, stage, number, ha="center", va="center", size=6)
                at += cost
        start += max(sum(costs[unit.work] for unit in units) for units in row)
    for work, colour in colours.items():
        if work is not Work.WEIGHTS or made.split:
            axes.bar(0, 0, color=colour, label=work.name.lower())
    axes.set(xlabel="time", ylabel="stage", yticks=range(made.stages))
    axes.set_title(f"{made.name}, {made.microbatches} microbatches")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a schedule, and draws it where a file is named."""
    settings = from_command_line(ScheduleCommand(), argv)
    made = schedule(settings.name, settings.stages, settings.microbatches, settings.chunks)
    times = settings.forward, settings.backward, settings.weights
    print(describe(made, *times))
    if settings.picture:
        if not (folder := Path(settings.picture).parent).is_dir():
            raise UserError(f"picture={settings.picture}: there is no folder {folder}")
        draw(made, *times).savefig(settings.picture)
        print(f"picture     {settings.picture}", file=sys.stderr)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
