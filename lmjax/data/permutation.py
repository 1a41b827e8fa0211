"""Pseudo-random permutations and numbers that are evaluated at an index, without state or table."""

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 6
ONE = np.uint64(1)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: far apart however often added
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(value: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Scrambles 64 bits: the finishing function of SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014)."""
    value = (value ^ (value >> SHIFTS[0])) * FACTORS[0]
    value = (value ^ (value >> SHIFTS[1])) * FACTORS[1]
    return value ^ (value >> SHIFTS[2])


def random_bits(*keys: int | Int64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """64 pseudo-random bits for each combination of keys; arrays broadcast."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        key = np.asarray(key).astype(np.uint64, casting="unsafe")
        state = mix((state ^ key) + GOLDEN)
    return state


def permute(
    index: Int64[np.ndarray, "count"],
    size: Int64[np.ndarray, "#count"],
    key: UInt64[np.ndarray, "#count"],
) -> Int64[np.ndarray, "count"]:
    """Images of indices under a permutation of `range(size)`; each key is one of its own.

    A Feistel network on the smallest even number of bits that holds `size` (Luby and Rackoff, "How
    to construct pseudorandom permutations from pseudorandom functions", 1988); what falls outside
    is sent on until it falls inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002), on average at most four times.
    """
    value = np.array(index, np.uint64)
    size, key = (np.broadcast_to(array, value.shape).astype(np.uint64) for array in (size, key))
    # Half the bits of size - 1, rounded up: a float64 holds a power of two exactly.
    half = np.maximum((np.frexp((size - ONE).astype(np.float64))[1] + 1) // 2, 1).astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        value[outside] = _feistel(value[outside], half[outside], key[outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64)


def _feistel(
    value: UInt64[np.ndarray, "count"],
    half: UInt64[np.ndarray, "count"],
    key: UInt64[np.ndarray, "count"],
) -> UInt64[np.ndarray, "count"]:
    mask = (ONE << half) - ONE
    left, right = value >> half, value & mask
    for _ in range(ROUNDS):
        key = key + GOLDEN
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half) | right
