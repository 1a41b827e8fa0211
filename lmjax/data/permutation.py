"""Pseudo-random permutations and numbers that are evaluated at an index, without state or table."""

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 8


def mix(value: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Scrambles 64 bits: the finishing function of SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014)."""
    value = np.asarray(value, np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def random_bits(*keys: int | Int64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """64 pseudo-random bits for each combination of keys; arrays broadcast."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        key = np.asarray(key).astype(np.uint64, casting="unsafe")
        state = mix((state ^ key) + np.uint64(0x9E3779B97F4A7C15))
    return state


def permute(
    index: Int64[np.ndarray, "count"],
    size: int,
    key: UInt64[np.ndarray, "#count"],
) -> Int64[np.ndarray, "count"]:
    """Where a permutation of `range(size)` sends each index; each key is a permutation of its own.

    A Feistel network on the smallest even number of bits that holds `size` (Luby and Rackoff, "How
    to construct pseudorandom permutations from pseudorandom functions", 1988); what falls outside
    is sent on until it falls inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002), on average at most four times.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    value = np.array(index, np.uint64)
    key = np.broadcast_to(np.asarray(key, np.uint64), value.shape)
    outside = np.ones(value.shape, bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half, key[outside])
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _feistel(
    value: UInt64[np.ndarray, "count"], half: int, key: UInt64[np.ndarray, "count"]
) -> UInt64[np.ndarray, "count"]:
    bits = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for number in range(ROUNDS):
        round_key = mix(key + np.uint64(number + 1))
        left, right = right, left ^ (mix(right ^ round_key) & mask)
    return (left << bits) | right
