"""A plan as one self-contained page, or as Markdown: tables, bars of memory, the pipeline."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from lmjax.config import UserError
from lmjax.parallel.schedules import Work, schedule
from lmjax.scaling.division import Division
from lmjax.scaling.plan_tables import Facts, PlanTable, markdown

TEMPLATE = Path(__file__).with_name("plan.html")
KINDS = (".html", ".md")
STAGES, MICROBATCHES = 16, 32  # most that a picture shows
CELL, ROW, MARGIN = 18, 22, 64  # pixels of a unit of time, of a stage, of the names
COLOURS = {Work.FORWARD: "forward", Work.BACKWARD: "backward", Work.WEIGHTS: "weights"}


def check_report(path: str) -> None:
    """Raises UserError for a file that cannot be written as a report."""
    if not path.endswith(KINDS):
        raise UserError(f"report={path}: the name must end in {' or '.join(KINDS)}")
    if not (folder := Path(path).parent).is_dir():
        raise UserError(f"report={path}: there is no folder {folder}")


def write_plan(
    path: str,
    title: str,
    facts: Facts,
    tables: Sequence[PlanTable],
    division: Division | None = None,
    pictures: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes the report.

    Args:
      path: of the file, which ends in .html or .md.
      title: of the page.
      facts: what matters most.
      tables: all else.
      division: of the step, whose pipeline is drawn on a page; None: there is none.
      pictures: further ones for a page: titles and HTML.
    """
    if path.endswith(".md"):
        text = markdown(title, facts, tables)
    else:
        text = page(title, facts, tables, division, pictures)
    Path(path).write_text(text, "utf-8")


def page(
    title: str,
    facts: Facts,
    tables: Sequence[PlanTable],
    division: Division | None,
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """The report as HTML; see `write_plan`."""
    rows = "".join(f"<dt>{_text(label)}</dt><dd>{_text(words)}</dd>" for label, words in facts)
    parts = [f'<div class="card"><dl>{rows}</dl></div>', *map(_section, tables)]
    for name, picture in pictures:
        parts.append(f'<h2>{_text(name)}</h2><div class="card">{picture}</div>')
    if division is not None and division.stage > 1:
        parts.append(f"<h2>Pipeline</h2>{pipeline_picture(division)}")
    template = TEMPLATE.read_text("utf-8")
    return template.replace("__BODY__", "\n".join(parts)).replace("__TITLE__", _text(title))


def pipeline_picture(division: Division) -> str:
    """The schedule as SVG: a row for each stage, time to the right.

    Of a long step the first microbatches are drawn, and of many stages the same schedule with
    fewer, as the caption says.
    """
    stages = min(division.stage, STAGES)
    microbatches = min(division.microbatches, MICROBATCHES) // stages * stages
    made = schedule(division.schedule, stages, microbatches, division.chunks)
    boxes, start = [], 0
    for row in made.ticks:
        for stage, units in enumerate(row):
            at = start
            for unit in units:
                width = CELL * (1 if made.split or unit.work is Work.FORWARD else 2)
                faint = unit.part // stages % 2
                boxes.append(_box(at, stage, width, COLOURS[unit.work], unit.microbatch, faint))
                at += width
        start += max(
            sum(CELL * (1 if made.split or u.work is Work.FORWARD else 2) for u in units)
            for units in row
        )
    names = "".join(
        f'<text class="name" x="{MARGIN - 8}" y="{stage * ROW + ROW / 2}">stage {stage}</text>'
        for stage in range(stages)
    )
    words = (
        f"{division.schedule}, {stages} of {division.stage} stages, {microbatches} of"
        f" {division.microbatches} microbatches: blue is forward, orange backward"
        + (", green the gradients of weights" if made.split else "")
        + (", pale the odd chunks" if made.chunks > 1 else "")
        + f". Of the whole step a stage waits {division.bubble:.1%}."
    )
    width, height = MARGIN + start, ROW * stages
    return (
        f'<div class="card"><figure><svg width="{width}" height="{height}" role="img">{names}'
        f"{''.join(boxes)}</svg><figcaption>{_text(words)}</figcaption></figure></div>"
    )


def _box(at: int, stage: int, width: int, colour: str, number: int, faint: int) -> str:
    """A unit of work as a box with its microbatch's number."""
    x, y = MARGIN + at, stage * ROW + 1
    opacity = 0.6 if faint else 1
    return (
        f'<rect x="{x}" y="{y}" width="{width - 1}" height="{ROW - 2}" rx="2"'
        f' fill="var(--{colour})" opacity="{opacity}"/>'
        f'<text x="{x + width / 2}" y="{y + ROW / 2 - 1}">{number}</text>'
    )


def _section(table: PlanTable) -> str:
    """A table with its bars and its remark."""
    more = ("",) if table.bars else ()
    head = "".join(f"<th>{_text(name)}</th>" for name in (*table.columns, *more))
    rows = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row)
        rows.append(f"<tr>{cells}{_bar(table.bars[number]) if table.bars else ''}</tr>")
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    body = f"<table><tr>{head}</tr>{''.join(rows)}</table>{note}"
    return f'<h2>{_text(table.title)}</h2><div class="card">{body}</div>'


def _bar(share: float) -> str:
    """A bar of a share, in another colour above 1."""
    over = ' class="over"' if share > 1 else ""
    return f'<td class="bar"><i{over} style="width:{min(share, 1):.1%}"></i></td>'


def _text(words: str) -> str:
    return html.escape(words)
