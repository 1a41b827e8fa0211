"""Counts and times of a server, in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PREFIX = "lmjax_"


class Histogram:
    """Seconds, counted by size."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Counts a time."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        """Lines of the format."""
        total = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self._counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class ServerMetrics:
    """Counts of the HTTP side; the engine's counts are added when they are read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._times = {
            "request_seconds": Histogram(),
            "first_token_seconds": Histogram(),
            "token_seconds": Histogram(),
        }

    def count(self, path: str, status: int, seconds: float) -> None:
        """Counts a response."""
        with self._lock:
            self._requests[path, status] += 1
            self._times["request_seconds"].add(seconds)

    def time(self, name: str, seconds: float) -> None:
        """Counts a time: first_token_seconds, token_seconds."""
        with self._lock:
            self._times[name].add(seconds)

    def text(self, counts: Mapping[str, int], gauges: Mapping[str, int]) -> str:
        """All of it.

        Args:
          counts: further counts, by name.
          gauges: numbers that rise and fall.
        """
        lines = []
        with self._lock:
            lines.append(f"# TYPE {PREFIX}requests_total counter")
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'{PREFIX}requests_total{{path="{path}",status="{status}"}} {count}')
            for name, times in self._times.items():
                lines.append(f"# TYPE {PREFIX}{name} histogram")
                lines += times.lines(PREFIX + name)
        for name, value in sorted(counts.items()):
            lines += [f"# TYPE {PREFIX}{name}_total counter", f"{PREFIX}{name}_total {value}"]
        for name, value in sorted(gauges.items()):
            lines += [f"# TYPE {PREFIX}{name} gauge", f"{PREFIX}{name} {value}"]
        return "\n".join(lines) + "\n"
