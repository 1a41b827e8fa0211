"""Parts that pictures are drawn of: boxes, fine lines, text of letters of one width."""

from __future__ import annotations

import functools
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY, RULE = "#1a1a1a", "#555555", "#d8d8d8"
SIZE = 8.0  # points, of all text
LETTER = 0.63 * SIZE / 72  # inches; letters all have this width, rounded up to pixels
CHINESE = {  # fonts of Linux, macOS and Windows
    "Noto Sans CJK SC",
    "Noto Sans Mono CJK SC",
    "WenQuanYi Micro Hei Mono",
    "PingFang SC",
    "Microsoft YaHei",
}


def draw_box(axes: Axes, box: tuple, colour: str) -> None:
    """A filled box (left, top, width, height); a cell begins half a unit before its middle."""
    from matplotlib.patches import Rectangle

    left, top, width, height = box
    corner = left - 0.5, top - 0.5
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, linewidth=0))


def draw_rules(axes: Axes, rows: int, columns: int) -> None:
    """Fine lines between the cells."""
    axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color=RULE, linewidth=0.4)
    axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color=RULE, linewidth=0.4)


def letters_of(text: str) -> int:
    """Number of letters that are as wide as a text; a Chinese sign counts as two."""
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


@functools.cache
def _fonts() -> list[str]:
    """One of equal widths, and for Chinese those that this machine has."""
    from matplotlib import font_manager

    return ["monospace", *sorted(CHINESE & set(font_manager.get_font_names()))]


def draw_text(axes: Axes, at: tuple, text: str, **options) -> None:
    """A text of letters of one width, as it stands."""
    fixed = {"fontsize": SIZE, "color": INK, "ha": "center", "va": "center_baseline"}
    axes.text(*at, text, **fixed | {"family": _fonts(), "parse_math": False} | options)
