"""The thread that has the devices: it does what others ask of it, one thing after another."""

from __future__ import annotations

import concurrent.futures
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

IDLE = 1.0  # seconds between two looks at the time where there is nothing to do


class QueueFull(Exception):
    """So many requests wait that no more are taken."""


class Worker:
    """Calls functions in one thread, which has a mesh set.

    `call` and `wake` are for any thread, `step`, `run` and `end` for that one.
    """

    def __init__(self, most: int):
        """Takes the most calls that wait."""
        self._most = most
        self._change = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future]] = deque()

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Calls a function between two steps; one whose future is cancelled before is not called.

        Raises:
          QueueFull: too many wait.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._change:
            if len(self._calls) >= self._most:
                raise QueueFull(f"{len(self._calls)} requests wait already; try again later")
            self._calls.append((function, future))
            self._change.notify()
        return future

    def wake(self) -> None:
        """Has `run` look at its event."""
        with self._change:
            self._change.notify()

    def run(self, stop: threading.Event) -> None:
        """Steps until the event is set, and ends."""
        try:
            while not stop.is_set():
                if not self.step():
                    with self._change:
                        if self.idle() and not stop.is_set():
                            self._change.wait(IDLE)
        finally:
            self.end()

    def step(self) -> bool:
        """Does the next piece of work; returns whether there was any."""
        with self._change:
            if not self._calls:
                return False
            function, future = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:  # is the caller's
                future.set_exception(error)
        return True

    def idle(self) -> bool:
        """Returns whether nothing waits that `step` would see."""
        return not self._calls

    def end(self) -> None:
        """Gives up what waits."""
        with self._change:
            calls, self._calls = list(self._calls), deque()
        for _, future in calls:
            future.cancel()
