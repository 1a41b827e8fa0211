"""A plan as tables of text, which terminal, Markdown and HTML show alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lmjax.console import LABEL, duration
from lmjax.scaling.advice import savers
from lmjax.scaling.costs import Costs
from lmjax.scaling.hardware import GB
from lmjax.scaling.plan import BOTTLENECKS, StepPlan

WIDTH = 220  # columns, also of a smaller terminal: nothing is left out


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """A table of text.

    Attributes:
      title: of the table.
      columns: names of the columns.
      rows: a text for each column; the first names the row.
      note: a remark.
      bars: shares, 0 to 1, that a picture shows beside the rows; empty: none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    bars: tuple[float, ...] = ()


Facts = list[tuple[str, str]]


def facts_of(plan: StepPlan, costs: Costs) -> Facts:
    """Labels and words of what matters most."""
    workload, division, cluster = plan.workload, plan.division, plan.cluster
    kind = cluster.accelerator
    hardware = workload.hardware_flops(division)
    each = plan.tokens_per_second / cluster.chips
    rows = f"{division.batch:,} rows of {workload.length:,} tokens"
    split = f"{division.microbatches:,} x {division.rows:,} on each of {division.shards:,} shards"
    if division.stage > 1:
        split += f"; pipeline {division.schedule}"
        split += f", {division.chunks} chunks" if division.schedule == "interleaved" else ""
    return [
        ("parameters", f"{workload.count:,}"),
        (
            "topology",
            f"{cluster.name}, {cluster.chips:,} chips of {kind.chip.flops / 1e12:,.0f} TFLOP/s and"
            f" {kind.memory / GB:.1f} GB that a program may have",
        ),
        ("mesh", f"{division}, zero={division.zero}, remat={division.remat}"),
        ("batch", f"{rows}: {split}"),
        (
            "FLOPs",
            f"{workload.model_flops:.3g} of a token, {hardware:.3g} with what is computed again",
        ),
        (
            "step",
            f"{seconds(plan.seconds)}, {plan.tokens_per_second:,.0f} tokens/s, {each:,.0f} a chip",
        ),
        (
            "MFU",
            f"{plan.mfu:.1%} ({plan.hfu:.1%} with what is computed again), if products reach"
            f" {kind.efficiency:.1%} of the peak",
        ),
        ("bottleneck", f"{plan.bottleneck}; of all else most is lost to: {plan.lost}"),
        (
            "training",
            f"{workload.tokens / 1e9:,.1f} B tokens: {costs.days:,.1f} days,"
            f" {costs.chip_hours:,.0f} chip hours",
        ),
        (
            "costs",
            f"{costs.dollars:,.0f} dollars, {costs.kilowatt_hours:,.0f} kWh,"
            f" {costs.carbon / 1000:,.1f} t of carbon dioxide",
        ),
    ]


def tables_of(plan: StepPlan) -> list[PlanTable]:
    """Memory, communication and time."""
    tables = [memory_table(plan), time_table(plan)]
    if plan.traffic:
        tables.insert(1, traffic_table(plan))
    return tables


def memory_table(plan: StepPlan) -> PlanTable:
    """Memory of the fullest chip by what it holds."""
    available, memory = plan.cluster.accelerator.memory, plan.memory
    parts = {name: size for name, size in memory.parts.items() if size}
    rows = [(name, gigabytes(size), f"{size / available:.1%}") for name, size in parts.items()]
    rows.append(("all", gigabytes(memory.total), f"{memory.total / available:.1%}"))
    return PlanTable(
        "Memory of a chip",
        ("", "GB", f"of {available / GB:.1f} GB"),
        tuple(rows),
        verdict(plan),
        tuple(size / available for size in (*parts.values(), memory.total)),
    )


def verdict(plan: StepPlan) -> str:
    """Words on the memory: by how much it fits or not, and what would help."""
    if plan.fits:
        return f"It fits: {gigabytes(-plan.missing)} GB of a chip are left."
    found = savers(plan)
    words = f"It does not fit: {gigabytes(plan.missing)} GB of a chip are missing."
    if not found:
        return words + " No single setting saves as much: take more chips, or chips with more."
    return words + " It would fit with " + ", or ".join(found) + "."


def traffic_table(plan: StepPlan) -> PlanTable:
    """Communication of a step by axis."""
    rows = tuple(
        (
            f"{moved.axis}={getattr(plan.division, moved.axis)}",
            moved.kind,
            moved.what,
            gigabytes(moved.bytes),
            f"{moved.bytes / moved.seconds / GB:.0f}",
            seconds(moved.seconds),
            "meanwhile" if moved.hidden else "waited for",
        )
        for moved in plan.traffic
    )
    columns = ("axis", "collective", "of", "GB a chip", "GB/s", "time", "")
    return PlanTable("Communication of a step", columns, rows)


def time_table(plan: StepPlan) -> PlanTable:
    """Time of a step by what it is spent on."""
    spent = [(name, part) for name, part in plan.times.items() if part]
    rows = [(BOTTLENECKS[name], seconds(p), f"{p / plan.seconds:.1%}") for name, p in spent]
    rows.append(("all", seconds(plan.seconds), ""))
    note = ""
    if plan.division.stage > 1:
        note = (
            f"In the pipeline a stage waits {plan.division.bubble:.1%} of the time, and holds"
            f" activations of at most {plan.division.live:g} microbatches."
        )
    bars = tuple(part / plan.seconds for _, part in spent)
    return PlanTable("Time of a step", ("", "time", "share"), tuple(rows), note, (*bars, 1.0))


def print_facts(facts: Facts, console: Console) -> None:
    """Prints a line for each."""
    for label, words in facts:
        console.print(Text.assemble((f"{label:<{LABEL}}", "cyan"), words), soft_wrap=True)


def print_table(table: PlanTable, console: Console) -> None:
    """Prints a table, and its remark."""
    shown = RichTable(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for number, name in enumerate(table.columns):
        left = number == 0 or not _is_number(table, number)
        shown.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    console.width = max(console.width, WIDTH)
    console.print()
    console.print(Text(table.title, style="bold"))
    console.print(shown)
    if table.note:
        console.print(table.note, soft_wrap=True)


def markdown(title: str, facts: Facts, tables: Sequence[PlanTable]) -> str:
    """The same as Markdown."""
    lines = [f"# {title}", ""]
    lines += [f"- {label}: {words}" for label, words in facts]
    for table in tables:
        lines += ["", f"## {table.title}", "", *markdown_rows(table)]
        if table.note:
            lines += ["", table.note]
    return "\n".join(lines) + "\n"


def markdown_rows(table: PlanTable) -> list[str]:
    """Lines of a table in Markdown."""
    rule = ("---:" if n and _is_number(table, n) else "---" for n in range(len(table.columns)))
    rows = (table.columns, tuple(rule), *table.rows)
    return ["| " + " | ".join(cell or " " for cell in row) + " |" for row in rows]


def _is_number(table: PlanTable, column: int) -> bool:
    return all(row[column][:1] in "-0123456789" for row in table.rows if row[column])


def gigabytes(size: int | float) -> str:
    """Bytes as GB with three digits or so."""
    number = size / GB
    return f"{number:,.2f}" if abs(number) < 100 else f"{number:,.0f}"


def seconds(time: float) -> str:
    """Words for a time: `3.1 ms`, `4.20 s`, `3 min 05 s`."""
    if time < 1:
        return f"{time * 1000:.3g} ms"
    return f"{time:.2f} s" if time < 60 else duration(time)
