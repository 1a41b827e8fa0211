"""Stretches: layers whose windows follow a pattern, grouped so that each is compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax


class Stretch(NamedTuple):
    """Neighbouring layers that repeat a pattern of windows.

    Attributes:
      windows: of the layers of one period; None: a layer without one.
      periods: how often they come one after another.
    """

    windows: tuple[int | None, ...]
    periods: int

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows) * self.periods

    def cut(self, stack: jax.Array, first: int, group: int = 1) -> jax.Array:
        """Its layers out of a stack of all, of which `first` is its first.

        By period, and by layer of a period where that has several.

        Args:
          stack: an entry for each layer, or for each group of so many.
          first: number of a layer.
          group: layers of an entry.
        """
        entries = len(self.windows) // group
        own = stack[first // group : (first + self.layers) // group]
        if entries == 1:  # what backward reads of it is then no copy
            return own
        return own.reshape(self.periods, entries, *stack.shape[1:])


def stretches(
    windows: Sequence[int | None], scanned: bool = True, group: int = 1
) -> tuple[Stretch, ...]:
    """Cuts layers, given the window of each, so that few of them have to be compiled.

    From the first layer on, the period that repeats furthest is taken, the shortest of several;
    a layer from which nothing repeats stands alone, and where nothing is scanned, each does.

    Args:
      windows: of the layers.
      scanned: whether layers are scanned.
      group: neighbouring layers that are never cut apart.
    """
    if not scanned:
        groups = range(0, len(windows), group)
        return tuple(Stretch(tuple(windows[first : first + group]), 1) for first in groups)
    found, first = [], 0
    while first < len(windows):
        rest = tuple(windows[first:])
        periods = range(group, len(rest) // 2 + 1, group)
        repeated = [Stretch(rest[:period], _times(rest, period)) for period in periods]
        repeated = [stretch for stretch in repeated if stretch.periods > 1]
        best = max(repeated, key=lambda stretch: stretch.layers, default=Stretch(rest[:group], 1))
        found.append(best)
        first += best.layers
    return tuple(found)


def pattern(windows: Sequence[int | None], group: int = 1) -> tuple[int | None, ...]:
    """The fewest windows that, repeated and cut off, give the window of every layer.

    They are those of whole groups of so many layers.
    """
    given = tuple(windows)
    periods = range(group, len(given), group)
    repeats = (period for period in periods if given[period:] == given[: len(given) - period])
    return given[: next(repeats, len(given))]


def _times(windows: Sequence[int | None], period: int) -> int:
    """Number of times that the first `period` windows repeat from the first on."""
    times = 1
    while windows[times * period : (times + 1) * period] == windows[:period]:
        times += 1
    return times
