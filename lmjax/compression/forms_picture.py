"""A picture of models by what they take and what they give, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT, MARGIN = 640.0, 300.0, 56.0  # pixels
LETTER, FAR = 12.0, 120.0  # pixels between names: so much below each other, or beside
MARKS = 4  # numbers along an axis, about


class Point(NamedTuple):
    """A model: its name, and its two numbers."""

    name: str
    x: float
    y: float


def picture(points: Sequence[Point], x: str, y: str, caption: str) -> str:
    """Points with their names; axes begin where the numbers do.

    Args:
      points: finite numbers.
      x, y: names of the axes.
      caption: below the picture.
    """
    (left, right, across), (low, high, up) = (
        _range([getattr(point, axis) for point in points]) for axis in "xy"
    )

    def at(value: float, of: tuple[float, float], size: float) -> float:
        return MARGIN + (value - of[0]) / (of[1] - of[0]) * (size - 2 * MARGIN)

    def spot(a: float, b: float) -> tuple[float, float]:
        return at(a, (left, right), WIDTH), HEIGHT - at(b, (low, high), HEIGHT)

    parts, taken = [], []
    for value in across:
        column, _ = spot(value, low)
        parts.append(_line(column, MARGIN / 2, column, HEIGHT - MARGIN))
        parts.append(_text(column, HEIGHT - MARGIN + 16, f"{value:g}", "middle"))
    for value in up:
        _, row = spot(left, value)
        parts.append(_line(MARGIN, row, WIDTH - MARGIN / 2, row))
        parts.append(_text(MARGIN - 8, row, f"{value:g}", "end"))
    for point in points:
        column, row = spot(point.x, point.y)
        parts.append(f'<circle cx="{column:.1f}" cy="{row:.1f}" r="4" fill="var(--bar)"/>')
        end = column > WIDTH / 2  # the name goes where there is room
        while any(abs(row - r) < LETTER and abs(column - c) < FAR for c, r in taken):
            row -= LETTER
        taken.append((column, row))
        name = column + (-8 if end else 8), row - 9
        parts.append(_text(*name, point.name, "end" if end else "start", "--ink"))
    parts.append(_text(WIDTH / 2, HEIGHT - 12, x, "middle"))
    parts.append(_text(MARGIN, MARGIN / 2 - 10, y, "start"))
    return (
        f'<figure><svg width="{WIDTH:g}" height="{HEIGHT:g}" role="img" aria-label="{_safe(y)} by'
        f' {_safe(x)}">{"".join(parts)}</svg><figcaption>{_safe(caption)}</figcaption></figure>'
    )


def _range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends of an axis on which all values lie, and round numbers along it."""
    low, high = min(values), max(values)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    step = 10 ** math.floor(math.log10((high - low) / MARKS))
    step = next(step * n for n in (1, 2, 5, 10) if (high - low) / (step * n) <= MARKS + 1)
    first = math.ceil(low / step)
    count = math.floor(high / step) - first + 1
    return low, high, [round((first + n) * step, 10) for n in range(count)]


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} stroke="var(--rule)"/>'


def _text(x: float, y: float, words: str, anchor: str, colour: str = "--soft") -> str:
    style = f"fill:var({colour});text-anchor:{anchor};font-size:11px"
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{_safe(words)}</text>'


def _safe(words: str) -> str:
    return html.escape(words)
