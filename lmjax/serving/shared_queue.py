"""The queue from which one engine, or several, take their requests; for any thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from lmjax.serving.active import ActiveRequest
from lmjax.serving.fair_queue import FairQueue
from lmjax.serving.worker import QueueFull


class SharedQueue:
    """Requests that wait, each for one of the takers; see `FairQueue` for their order.

    What waits for a taker that has no room is taken by another one that has nothing else to take.
    """

    def __init__(self, most: int):
        """Takes the most requests that wait, for all takers together."""
        self._most = most
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._queues: list[FairQueue[ActiveRequest]] = []
        self._takers: list[tuple[Callable[[], object], Callable[[], bool]]] = []

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def join(self, wake: Callable[[], object], full: Callable[[], bool]) -> int:
        """Adds a taker, and returns its number.

        Args:
          wake: is called when there may be a request for it.
          full: returns whether it has no room; takes no locks.
        """
        self._queues.append(FairQueue())
        self._takers.append((wake, full))
        return len(self._takers) - 1

    def waiting(self, taker: int) -> int:
        """Number of requests that wait for a taker."""
        return len(self._queues[taker])

    def push(self, client: str, make: Callable[[int], ActiveRequest], taker: int) -> int:
        """Adds a request of a client for a taker; returns its number, which `make` is given.

        Raises:
          QueueFull: too many requests wait.
        """
        with self._lock:
            if len(self) >= self._most:
                raise QueueFull(f"{len(self)} requests wait already; try again later")
            number = next(self._numbers)
            self._queues[taker].push(client, make(number))
        self.wake()
        return number

    def wake(self) -> None:
        """Wakes all takers."""
        for wake, _ in self._takers:
            wake()

    def pop(self, taker: int) -> ActiveRequest | None:
        """Takes the request whose turn it is; None where none is there for the taker."""
        with self._lock:
            queue = self._next(taker)
            return None if queue is None else queue.pop()

    def offers(self, taker: int) -> bool:
        """Returns whether `pop` has a request."""
        with self._lock:
            return self._next(taker) is not None

    def remove(self, wanted: Callable[[ActiveRequest], bool]) -> list[ActiveRequest]:
        """Takes all requests that are wanted out of the queue."""
        with self._lock:
            return [one for queue in self._queues for one in queue.remove(wanted)]

    def _next(self, taker: int) -> FairQueue[ActiveRequest] | None:
        """The queue that a taker takes from: its own, or the longest of those who have no room."""
        if self._queues[taker]:
            return self._queues[taker]
        pairs = zip(self._queues, self._takers)
        return max((queue for queue, (_, full) in pairs if queue and full()), key=len, default=None)
