"""Work that takes far longer than it usually does, and the processes that have not come to it."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict, deque
from collections.abc import Sequence

REMEMBERED = 20  # durations of a kind of work


@dataclasses.dataclass(frozen=True)
class Limits:
    """Durations above which work counts as late.

    Attributes:
      factor: of its longest duration lately.
      least: seconds before which nothing is late.
      first: seconds for what has not been done before, compilation with it.
      end_after: seconds after which the run ends; None: it waits.
    """

    factor: float = 10.0
    least: float = 60.0
    first: float = 1800.0
    end_after: float | None = 3600.0


@dataclasses.dataclass(frozen=True)
class Doing:
    """Work of a process.

    Attributes:
      what: words such as "step", which go before the number of a step.
      step: of the run.
      rank: number of `what` among the parts of a step.
      since: moment at which it began, by the clock of the process that looks.
    """

    what: str
    step: int
    rank: int
    since: float

    def named(self) -> str:
        """It with its step."""
        return f"{self.what} {self.step}"


Channels = dict[str, Doing]  # what goes on beside each other in a process


@dataclasses.dataclass(frozen=True)
class Late:
    """Work that is late.

    Attributes:
      doing: the part that is furthest.
      seconds: that it has taken.
      usual: its longest duration lately; None: it has not been done before.
      come: processes that do it.
      behind: processes that have not come to it, and what they do instead.
    """

    doing: Doing
    seconds: float
    usual: float | None
    come: tuple[int, ...]
    behind: tuple[tuple[int, Doing], ...]

    def words(self, hosts: Sequence[str]) -> str:
        """It as a sentence; `hosts` are the machines of all processes."""
        usual = "" if self.usual is None else f" (usually {self.usual:.1f} s at most)"
        head = f"{self.doing.named()} has taken {self.seconds:.0f} s{usual}"
        if not self.behind:
            return (
                f"{head}: all {len(self.come)} processes at it have come, so a device, a disk or "
                "the network between them hangs"
            )
        few = [
            f"process {index} on {hosts[index]} ({doing.named()})"
            for index, doing in self.behind[:8]
        ]
        more = [f"and {len(self.behind) - 8} more"] * (len(self.behind) > 8)
        return f"{head}: {len(self.come)} processes have come, not so {', '.join(few + more)}"


class Lateness:
    """Durations of work in this process, and a look at what others do."""

    def __init__(self) -> None:
        """Nothing has been done yet."""
        self.usual: dict[tuple[str, str], deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )

    def took(self, channel: str, doing: Doing, now: float) -> None:
        """Notes that something has been done; the first time of a kind, which compiles, is none."""
        known = (channel, doing.what) in self.usual
        durations = self.usual[channel, doing.what]
        if known:
            durations.append(now - doing.since)

    def look(self, members: Sequence[Channels], now: float, limits: Limits) -> Late | None:
        """The work that is latest; None: all is well.

        Args:
          members: what each process does.
          now: moment of the look.
          limits: when work counts as late.
        """
        found = []
        for channel in sorted({name for channels in members for name in channels}):
            at = [
                (i, channels[channel]) for i, channels in enumerate(members) if channel in channels
            ]
            longest = max((doing for _, doing in at), key=lambda doing: now - doing.since)
            durations = self.usual.get((channel, longest.what))
            usual = max(durations) if durations else None
            limit = limits.first if usual is None else limits.factor * usual
            if now - longest.since > max(limits.least, limit):
                found.append(_late(at, now, usual))
        return max(found, key=lambda late: late.seconds, default=None)


def _late(at: Sequence[tuple[int, Doing]], now: float, usual: float | None) -> Late:
    rank = max((doing.step, doing.rank) for _, doing in at)
    come = [(i, doing) for i, doing in at if (doing.step, doing.rank) == rank]
    behind = tuple((i, doing) for i, doing in at if (doing.step, doing.rank) != rank)
    seconds = max(now - doing.since for _, doing in at)
    return Late(come[0][1], seconds, usual, tuple(i for i, _ in come), behind)


def to_words(channels: Channels, now: float) -> dict[str, list]:
    """Channels as JSON; moments as the seconds since then, as clocks differ."""
    return {
        name: [doing.what, doing.step, doing.rank, round(now - doing.since, 3)]
        for name, doing in channels.items()
    }


def from_words(words: dict[str, list]) -> Channels:
    """See `to_words`; ValueError, TypeError or AttributeError where they are none."""
    now = time.monotonic()
    return {
        str(name): Doing(str(what), int(step), int(rank), now - float(seconds))
        for name, (what, step, rank, seconds) in words.items()
    }
