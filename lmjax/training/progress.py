"""The line that says how a run is doing, and the clock that leaves out what is not training."""

import sys
import time
from collections import deque
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from lmjax.console import duration

WINDOW = 20  # steps over which the shown speed is taken
PLAIN_LINES = 40  # lines that a whole run prints where there is no terminal


class Clock:
    """Seconds spent training: time inside `with clock.paused():` does not count.

    Without this the throughput after an evaluation or a checkpoint would be a dip that says
    nothing about the step.
    """

    def __init__(self, now=time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._left_out = 0.0
        self._nested = False

    def seconds(self) -> float:
        """Seconds since the start, without the pauses that have ended."""
        return self._now() - self._start - self._left_out

    @contextmanager
    def paused(self, when: bool = True):
        """Leaves the time inside out, if `when`; pauses may nest."""
        if self._nested or not when:
            yield
            return
        self._nested = True
        begin = self._now()
        try:
            yield
        finally:
            self._left_out += self._now() - begin
            self._nested = False


class Progress:
    """A live line (step, loss, tokens/s, time left), or plain lines where there is no terminal.

    Use as a context manager round the loop. Costs about 10 microseconds a step.
    """

    def __init__(self, first: int, total: int, console: Console | None = None) -> None:
        """`first` steps of `total` are already done."""
        self.console = console or Console(file=sys.stdout, highlight=False)
        self.live = self.console.is_terminal
        self._first, self._total = first, total
        self._every = max(1, (total - first) // PLAIN_LINES)
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=WINDOW + 1)
        self._tokens = 0.0
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28, style="grey37", complete_style="cyan"),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=True,
            disable=not self.live,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(
            "starting", total=total, completed=first, numbers="compiling the step"
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float | None, tokens: float, seconds: float) -> None:
        """Shows that `step` steps are done.

        Args:
            step: steps done in the whole run, 1 after the first one.
            loss: of this step; None: it had nothing to learn from.
            tokens: that this step learnt from.
            seconds: the training clock when the step was done.
        """
        self._tokens += tokens
        self._recent.append((step, self._tokens, seconds))
        speed, left = self._speed()
        numbers = f"loss {'–' if loss is None else f'{loss:.4f}'}  {speed}  {left}"
        if self.live:
            self._bar.update(
                self._task, completed=step, description=f"step {step:,}", numbers=numbers
            )
        elif (step - self._first) % self._every == 0 or step in (self._first + 1, self._total):
            self.console.print(f"step {step:>7,}/{self._total:,}  {numbers}")

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        self.console.print(text)

    @contextmanager
    def doing(self, what: str):
        """Shows what the run is at while it is not training."""
        before = self._bar.tasks[0].description
        self._bar.update(self._task, description=what)
        try:
            yield
        finally:
            self._bar.update(self._task, description=before)

    def _speed(self) -> tuple[str, str]:
        (step, tokens, seconds), (step_then, tokens_then, seconds_then) = (
            self._recent[-1],
            self._recent[0],
        )
        if step == step_then or seconds <= seconds_then:
            return "", ""
        speed = (tokens - tokens_then) / (seconds - seconds_then)
        left = (self._total - step) * (seconds - seconds_then) / (step - step_then)
        return f"{speed:,.0f} tokens/s", f"{duration(left)} left"
