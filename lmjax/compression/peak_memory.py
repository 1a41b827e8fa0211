"""The most memory that is in use while something runs."""

from __future__ import annotations

import gc
import threading

from lmjax.scaling.hardware import memory_in_use

INTERVAL = 0.005  # seconds between two looks


class PeakMemory:
    """Looks again and again how much memory is in use, in a thread, until it is closed.

    What was in use before does not count. The peaks that systems keep are those of a process, in
    which one model is measured after another.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before = self._most = memory_in_use()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._most = max(self._most, memory_in_use())

    @property
    def bytes(self) -> int:
        """The most bytes above those before, so far."""
        return self._most - self._before

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            self._most = max(self._most, memory_in_use())
