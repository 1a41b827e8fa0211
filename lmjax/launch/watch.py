"""The watch over the processes of a run: who has not come, who is gone, who is late.

Each process tells the first one, by a connection that stays open, what it does (`report`). The
first one decides for all: a process whose connection breaks is gone, one that says nothing for
`SILENCE` seconds is taken to be, and of work that takes far longer than it usually does it is said
which processes have come to it and which have not. A run that lost a process cannot go on, because
its collective operations would wait for ever: all processes end, with the reason, and the same
command goes on from the last checkpoint.

JAX's own service ends processes too, later and with no word of which host; it stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable

from lmjax.launch.cluster import ProcessGroup
from lmjax.launch.lateness import Channels, Doing, Lateness, Limits, from_words, to_words
from lmjax.launch.line import Connection, Station, port_of

LOST = 75  # exit code of a process that ends because of another one; EX_TEMPFAIL: worth a retry
INTERVAL = 2.0  # seconds between two words of a process
SILENCE = 40.0  # seconds without a word after which a process is taken to be gone
GRACE = 10.0  # seconds in which a process may end by itself where another one has failed
WAITING = 30.0  # seconds after which it is said who has not come; then twice as many
COMING = 300.0  # seconds after which the run ends where not all have come
MEETING = 10.0  # seconds that processes which JAX has joined wait for each other's first word


@dataclasses.dataclass
class Member:
    """One process, as another one knows it.

    Attributes:
      host: name of its machine; empty: it has not come.
      heard: moment of its last word.
      channels: what it does.
      ended: why it ends, empty where it came to its end; None: it goes on.
      code: exit code that it ends with.
      broken: whether its connection broke.
    """

    host: str = ""
    heard: float = 0.0
    channels: Channels = dataclasses.field(default_factory=dict)
    ended: str | None = None
    code: int = 0
    broken: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The reason why all processes end, and the one that it lies in; None: in no single one."""

    why: str
    culprit: int | None = None

    @property
    def words(self) -> str:
        """It for a person."""
        return f"The run ends: {self.why}. The same command goes on from the last checkpoint."


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Watch:
    """One process's part in the watch; see the module."""

    def __init__(self, cluster: ProcessGroup, say: Callable[[str], None] = _say) -> None:
        """Nothing is opened yet.

        Args:
          cluster: where this process stands.
          say: takes a line for a person.
        """
        self.cluster, self.say = cluster, say
        self.limits, self.lateness = Limits(), Lateness()
        self.members = [Member() for _ in range(cluster.count)]
        self.me = self.members[cluster.index]
        self.me.host = os.uname().nodename
        self.first = cluster.index == 0
        self.joined = False  # whether all have come, as JAX says
        self.verdict: Verdict | None = None
        self.settled = threading.Event()  # there is a verdict, or all processes end by themselves
        self._line: Station | Connection = (Station if self.first else Connection)(
            cluster, self._hear
        )
        self._lock, self._wake = threading.RLock(), threading.Event()
        self._began = time.monotonic()
        self._waiting, self._said, self._failed_at = WAITING, 0.0, None
        self._over = self._listens = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def open(self) -> None:
        """Begins to watch."""
        try:
            self._line.open()
            self._listens = True
        except OSError as error:
            self.say(f"No watch over the processes: port {port_of(self.cluster)[1]}: {error}")
        self._thread.start()

    def join(self) -> None:
        """Waits, once JAX has joined the processes, until this one and the first know each other.

        One that is killed before its first word would be no one's loss.
        """
        self.joined = True
        others = self.members[1:] if self.first else self.members[:1]
        latest = time.monotonic() + MEETING
        while self._listens and time.monotonic() < latest:
            met = all(member.host for member in others)
            self._tell()
            if met:
                break
            time.sleep(0.1)

    def close(self) -> None:
        """Stops to watch."""
        self._over = True
        self._wake.set()
        self._thread.join()
        self._line.close()

    def report(self, channel: str, what: str | None, step: int = 0, rank: int = 0) -> None:
        """Tells what this process does from now on.

        Args:
          channel: work that goes on beside other work has one of its own.
          what: words that go before a step's number, such as "step"; None: nothing.
          step: of the run.
          rank: place of `what` among the parts of a step.
        """
        now = time.monotonic()
        with self._lock:
            channels = dict(self.me.channels)
            if (before := channels.pop(channel, None)) is not None:
                self.lateness.took(channel, before, now)
            if what is not None:
                channels[channel] = Doing(what, step, rank, now)
            self.me.channels = channels

    def leave(self, why: str, code: int) -> None:
        """Tells the others that this process ends. Where it failed, waits for what they say."""
        with self._lock:
            self.me.ended, self.me.code, self.me.channels = why, code, {}
        self._tell()
        self._wake.set()
        if code:
            self.settled.wait(SILENCE + GRACE)
            if self.first:  # the others have to hear of it before the coordinator is gone
                self._tell()
                time.sleep(INTERVAL)

    # ---- the threads ---------------------------------------------------------------------------

    def _run(self) -> None:
        told = 0.0
        while not self._over:
            self._wake.wait(INTERVAL / 2)
            self._wake.clear()
            now = time.monotonic()
            with self._lock:
                before = self.settled.is_set()
                self._look(now)
                news = self.settled.is_set() and not before
            if news or now - told >= INTERVAL:
                told = now
                self._tell()
            if self.verdict is not None and self.me.ended is None and not self._over:
                self._over = True
                self._end()

    def _end(self) -> None:
        """Ends this process, whatever its main thread waits for."""
        self.say(self.verdict.words)
        if self.first:
            time.sleep(INTERVAL)
        stop_now(LOST)

    def _tell(self) -> None:
        """Sends this process's word: to the first, or from it to all."""
        with self._lock:
            me, verdict = self.me, self.verdict
            word = {"host": me.host, "ended": me.ended, "code": me.code}
            word["channels"] = to_words(me.channels, time.monotonic())
            if self.first:
                word["settled"] = self.settled.is_set()
                word["verdict"] = verdict and [verdict.why, verdict.culprit]
        self._line.send(word)

    def _hear(self, index: int, word: dict | None) -> None:
        """Takes a word of a process, None where its connection broke; called by the line."""
        if not 0 <= index < len(self.members) or index == self.cluster.index:
            return
        member, now = self.members[index], time.monotonic()
        with self._lock, contextlib.suppress(ValueError, TypeError, AttributeError):
            member.broken = word is None
            if word is not None:
                member.host, member.heard = str(word["host"]), now
                member.ended, member.code = word["ended"], int(word["code"])
                member.channels = from_words(word["channels"])
                if index == 0 and word.get("verdict") and self.verdict is None:
                    self.verdict = Verdict(*word["verdict"])
                if index == 0 and word.get("settled"):
                    self.settled.set()
        if word is None or member.ended is not None or self.settled.is_set():
            self._wake.set()

    # ---- what the first process decides, and the others of the first one -----------------------

    def _look(self, now: float) -> None:
        if self.settled.is_set():
            return
        watched = range(1, len(self.members)) if self.first else (0,)
        self.verdict = self._gone(now, watched)
        if self.first and self.verdict is None:
            self.verdict = self._missing(now) or self._failed(now) or self._late(now)
        over = self.first and all(m.ended is not None for m in self.members)
        if self.verdict is not None or over:
            self.settled.set()

    def _gone(self, now: float, watched: range | tuple[int, ...]) -> Verdict | None:
        """A process that is there no more, though it has not said that it ends."""
        for index in watched:
            member = self.members[index]
            if not member.host or member.ended is not None:
                continue
            doing = ", ".join(doing.named() for doing in member.channels.values())
            doing = doing and f", in {doing}"
            if member.broken:
                return Verdict(f"{self._name(index)} is gone{doing}", index)
            if now - member.heard > SILENCE:
                words = f"{self._name(index)} has said nothing for {SILENCE:.0f} s{doing}"
                return Verdict(words, index)
        return None

    def _missing(self, now: float) -> Verdict | None:
        """Says, again and again, who has not come; in the end that is a reason."""
        missing = [str(index) for index, m in enumerate(self.members) if not m.host]
        seconds = now - self._began
        if self.joined or not missing or seconds < self._waiting:
            return None
        self._waiting *= 2
        here = sorted({m.host for m in self.members if m.host})
        words = (
            f"{_few(missing, 'process', 'processes')} of {len(self.members)} "
            f"{'has' if len(missing) == 1 else 'have'} not come to {self.cluster.address} within "
            f"{seconds:.0f} s; here is {_few(here, 'host', 'hosts')}"
        )
        if seconds > COMING:
            return Verdict(words)
        self.say(f"Still waiting: {words}")
        self._waiting = min(self._waiting, COMING)
        return None

    def _failed(self, now: float) -> Verdict | None:
        """A process that failed, once others have had time to say the same of themselves."""
        failed = [i for i, m in enumerate(self.members) if m.ended is not None and m.code]
        if not failed:
            return None
        self._failed_at = self._failed_at or now
        if now - self._failed_at < GRACE:
            return None
        why = self.members[failed[0]].ended
        return Verdict(f"{self._name(failed[0])} has ended: {why}", failed[0])

    def _late(self, now: float) -> Verdict | None:
        """Says what takes far longer than usual; in the end that is a reason."""
        members = [m.channels for m in self.members]
        late = self.lateness.look(members, now, self.limits)
        if late is None:
            self._said = 0.0
            return None
        words = late.words([m.host for m in self.members])
        if self.limits.end_after is not None and late.seconds > self.limits.end_after:
            return Verdict(words)
        if late.seconds > self._said:
            self._said = 2 * late.seconds
            self.say(words)
        return None

    def _name(self, index: int) -> str:
        return f"process {index} of {len(self.members)} on {self.members[index].host}"


def stop_now(code: int) -> None:
    """Ends this process without waiting for threads, but for its own worker processes' end."""
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _few(names: list[str], one: str, several: str) -> str:
    shown = ", ".join(names[:16]) + (" ..." if len(names) > 16 else "")
    return f"{one if len(names) == 1 else several} {shown}"
