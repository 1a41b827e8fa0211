"""State of engines at a moment, and the choice of the one that a request goes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class EngineLoad:
    """State of an engine at a moment, or of several together.

    Attributes:
      waiting: requests in its queue.
      reading, writing: requests whose prompt is read, and whose answer is written.
      pages: that requests hold.
      known_pages: that can be found by what they hold.
      all_pages: of the cache.
    """

    waiting: int
    reading: int
    writing: int
    pages: int
    known_pages: int
    all_pages: int

    @property
    def requests(self) -> int:
        """All requests."""
        return self.waiting + self.reading + self.writing


def chosen_engine(known: Sequence[int], loads: Sequence[EngineLoad], ahead: int) -> int:
    """Number of the engine that a request goes to.

    It is the one that knows the longest beginning of the prompt; of equals the one with the fewest
    requests, and then the one whose cache holds the least.

    Args:
      known: tokens at the beginning of the prompt that each engine need not compute.
      loads: of the engines.
      ahead: an engine with more than so many requests beyond those of the idlest gets none.
    """
    idlest = min(load.requests for load in loads)
    fit = [number for number, load in enumerate(loads) if load.requests - idlest <= ahead]
    return min(fit, key=lambda n: (-known[n], loads[n].requests, loads[n].known_pages))
