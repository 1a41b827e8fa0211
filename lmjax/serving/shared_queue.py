"""The queue from which one engine, or several, take their requests; for any thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from lmjax.serving.active import ActiveRequest
from lmjax.serving.fair_queue import FairQueue
from lmjax.serving.worker import QueueFull


class SharedQueue:
    """Requests that wait; see `FairQueue` for their order."""

    def __init__(self, most: int):
        """Takes the most requests that wait."""
        self._most = most
        self._lock = threading.Lock()
        self._queue: FairQueue[ActiveRequest] = FairQueue()
        self._numbers = itertools.count()
        self._takers: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def join(self, wake: Callable[[], object]) -> None:
        """Adds one who takes requests, and is woken when there is one."""
        self._takers.append(wake)

    def push(self, client: str, make: Callable[[int], ActiveRequest]) -> int:
        """Adds a request of a client, and returns its number, which `make` is given.

        Raises:
          QueueFull: too many requests wait.
        """
        with self._lock:
            if len(self._queue) >= self._most:
                raise QueueFull(f"{len(self._queue)} requests wait already; try again later")
            number = next(self._numbers)
            self._queue.push(client, make(number))
        for wake in self._takers:
            wake()
        return number

    def pop(self) -> ActiveRequest | None:
        """Takes the request whose turn it is; None where none waits."""
        with self._lock:
            return self._queue.pop() if self._queue else None

    def remove(self, wanted: Callable[[ActiveRequest], bool]) -> list[ActiveRequest]:
        """Takes all requests that are wanted out of the queue."""
        with self._lock:
            return self._queue.remove(wanted)
