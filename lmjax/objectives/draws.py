"""Random numbers of one row, the same on any machine, host and version."""

import numpy as np
from jaxtyping import Float64, Int64

from lmjax.data.permutation import random_bits

BLOCK = 1024  # numbers made at a time
MANTISSA = np.uint64(11)  # bits of 64 that a float64 has no room for


class RandomStream:
    """Random numbers in the order in which they are asked for, a function of the row's seed alone.

    Python's and numpy's generators may change from version to version, and with them the batches
    of a run that goes on; these do not.
    """

    def __init__(self, seed: int | np.uint64, stream: int = 0):
        """`stream` sets apart what is drawn for different ends with one seed."""
        self._keys = (int(seed), stream)
        self._left = np.empty(0)
        self._blocks = 0

    def uniform(self, count: int) -> Float64[np.ndarray, "count"]:
        """Numbers from 0 up to, but not including, 1."""
        while len(self._left) < count:
            counters = np.arange(self._blocks * BLOCK, (self._blocks + 1) * BLOCK)
            bits = random_bits(*self._keys, counters)
            self._left = np.concatenate([self._left, (bits >> MANTISSA) * 2.0**-53])
            self._blocks += 1
        drawn, self._left = self._left[:count], self._left[count:]
        return drawn

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.uniform(1)[0] < probability)

    def integers(
        self, first: int, last: int | Int64[np.ndarray, "count"], count: int
    ) -> Int64[np.ndarray, "count"]:
        """Integers from `first` to `last`, both included."""
        return first + (self.uniform(count) * (last - first + 1)).astype(np.int64)

    def integer(self, first: int, last: int) -> int:
        """One of `integers`."""
        return int(self.integers(first, last, 1)[0])

    def order(self, count: int) -> Int64[np.ndarray, "count"]:
        """The numbers from 0 to count - 1 in random order."""
        return np.argsort(self.uniform(count), kind="stable")

    def choices(
        self, cumulative: Float64[np.ndarray, "kinds"], count: int
    ) -> Int64[np.ndarray, "count"]:
        """Numbers of kinds whose probabilities add up to `cumulative`, of which the last is 1."""
        drawn = np.searchsorted(cumulative, self.uniform(count), side="right")
        return np.minimum(drawn, len(cumulative) - 1)
