"""The time of a compiled step by its schedule, as tables."""

from __future__ import annotations

from lmjax.scaling.plan_tables import Facts, PlanTable, seconds
from lmjax.scaling.step_schedule import PARTS, WAITS, ScheduledPiece, StepSchedule

BOUNDS = "static", "roofline", "waited"
WORDS = {
    "products": "products of weights",
    "attention": "attention",
    "loss": "head and loss",
    "optimizer": "optimizer",
    "rest": "the rest: norms, gates, positions, copies",
    "collectives": "waits for links",
    "copies": "waits for copies between memories",
}
SHOWN = 12  # instructions that take longest
ASSUMPTIONS = (
    "By cycles alone no memory and no link is waited for: a chip cannot be faster. Expected is the"
    " longer of each kernel's cycles and its bytes at the memory's rate; its waits for transfers"
    " are estimated. Links run at the planner's rates, {rates}; what is asynchronous"
    " is waited for only where the schedule awaits it, collectives over one axis follow each"
    " other, and those of different axes, and the memory, do not slow each other down. Not counted"
    " are what chips lose by waiting for the slowest one, and the host."
)


def schedule_facts(schedule: StepSchedule) -> Facts:
    """Labels and words of what the schedule says of the step."""
    least, step, most = (schedule.step(bound) for bound in BOUNDS)
    mfus = [schedule.mfu(bound) for bound in BOUNDS]
    words = (
        f"{seconds(step)} ({seconds(least)} to {seconds(most)}), MFU {mfus[1]:.1%}"
        f" ({mfus[2]:.1%} to {mfus[0]:.1%})"
    )
    return [("by schedule", words)]


def schedule_tables(schedule: StepSchedule) -> list[PlanTable]:
    """Time of a step by part, and its longest instructions."""
    return [_parts_table(schedule), _longest_table(schedule)]


def _parts_table(schedule: StepSchedule) -> PlanTable:
    by_bound = [schedule.seconds(bound) for bound in BOUNDS]
    steps = [sum(found.values()) for found in by_bound]
    pieces, peak = list(schedule.pieces.values()), schedule.chip.peak
    rows, bars = [], []
    for part in (*PARTS, *WAITS):
        if not (expected := by_bound[1][part]) and not by_bound[2][part]:
            continue
        mine = [piece for piece in pieces if piece.part == part]
        flops = sum(piece.runs * piece.flops for piece in mine)
        of_peak = f"{flops / (expected * peak):.1%}" if flops and expected else ""
        runs = f"{sum(piece.runs for piece in mine):,}" if mine else ""
        times = (seconds(found[part]) for found in by_bound)
        rows.append((WORDS[part], runs, *times, f"{expected / steps[1]:.1%}", of_peak))
        bars.append(expected / steps[1])
    rows.append(("all", "", *map(seconds, steps), "", ""))
    mfus = (f"{schedule.mfu(bound):.1%}" for bound in BOUNDS)
    rows.append(("MFU", "", *mfus, "", ""))
    columns = (
        "",
        "runs",
        "by cycles alone",
        "expected",
        "with memory waits",
        "share",
        "of the peak",
    )
    note = " ".join(filter(None, (_assumptions(schedule), _unknown(schedule))))
    title = "Time of a step by the compiled schedule"
    return PlanTable(title, columns, tuple(rows), note, (*bars, 1.0, schedule.mfu("roofline")))


def _assumptions(schedule: StepSchedule) -> str:
    sizes = schedule.plan.division.sizes
    rates = schedule.plan.cluster.rates(sizes)
    words = [f"{axis} {rates[axis] / 1e9:.0f} GB/s" for axis, size in sizes.items() if size > 1]
    busy = f" Links are busy for {seconds(schedule.links)}." if schedule.links else ""
    return ASSUMPTIONS.format(rates=", ".join(words) or "none") + busy


def _unknown(schedule: StepSchedule) -> str:
    """Words on what the times do not rest on kernels for."""
    pieces = list(schedule.pieces.values())
    step = schedule.step("roofline")
    guessed = [piece for piece in pieces if piece.source == "estimate"]
    nothing = [piece for piece in pieces if piece.source == "none"]
    words = []
    if guessed:
        share = sum(piece.runs * piece.roofline for piece in guessed) / step
        words.append(
            f"{_names(guessed)} have no kernel of their own: the compiler's estimates are taken,"
            f" {share:.1%} of the step."
        )
    if nothing:
        words.append(f"Without kernel and estimate, and taken as nothing: {_names(nothing)}.")
    asked = [piece for piece in pieces if piece.guesses and piece.part == "attention"]
    if asked:
        words.append(
            f"Not all scalars are known of {_names(asked)}: more may be counted than runs."
        )
    return " ".join(words)


def _names(pieces: list[ScheduledPiece], most: int = 4) -> str:
    names = [piece.name for piece in pieces]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _longest_table(schedule: StepSchedule) -> PlanTable:
    found = sorted(schedule.pieces.values(), key=lambda piece: -piece.runs * piece.roofline)
    step, peak = schedule.step("roofline"), schedule.chip.peak
    rows = tuple(
        (
            piece.name,
            piece.part,
            f"{piece.runs:,}",
            seconds(piece.static),
            seconds(piece.roofline),
            seconds(piece.runs * piece.roofline),
            f"{piece.runs * piece.roofline / step:.1%}",
            f"{piece.flops / (piece.roofline * peak):.1%}" if piece.flops else "",
        )
        for piece in found[:SHOWN]
        if piece.roofline
    )
    columns = ("", "part", "runs", "cycles", "expected", "in a step", "share", "of the peak")
    return PlanTable("Instructions that take longest", columns, rows)
