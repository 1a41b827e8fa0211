"""The permutation is one for every size and key, and scatters what lies together."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmjax.data.permutation import permute, random_bits


def whole(size, key):
    return permute(np.arange(size), np.array([size]), np.array([key], np.uint64))


@settings(max_examples=150)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@example(size=1, key=0)
@example(size=2, key=0)
@example(size=4096, key=1)
@example(size=4097, key=1)
def test_is_a_bijection(size, key):
    assert sorted(whole(size, key).tolist()) == list(range(size))


def test_large_sizes_stay_inside_and_do_not_collide():
    size = 10**12 + 39
    index = np.arange(size - 100_000, size)
    found = permute(index, np.array([size]), random_bits(3))
    assert found.min() >= 0 and found.max() < size
    assert len(np.unique(found)) == len(found)


def test_each_index_may_have_its_own_size_and_key():
    size = np.array([7, 100, 7, 1])
    key = random_bits(np.arange(4))
    together = permute(np.array([3, 99, 3, 0]), size, key)
    alone = [
        permute(np.array([3]), size[:1], key[:1]),
        permute(np.array([99]), size[1:2], key[1:2]),
    ]
    assert together[:2].tolist() == [alone[0][0], alone[1][0]]
    assert together[3] == 0


def test_looks_random():
    size = 10_000
    one, other = whole(size, 1), whole(size, 2)
    # Independent permutations: correlation 0 with standard deviation 1/sqrt(size) = 0.01, and
    # about one fixed point.
    for first, second in ((np.arange(size), one), (one, other), (one[:-1], one[1:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (one == np.arange(size)).sum() < 10
    assert (one == other).sum() < 10


def test_random_bits():
    bits = random_bits(7, np.arange(10_000), 1)
    assert bits.dtype == np.uint64 and len(np.unique(bits)) == 10_000
    # Each bit is set half the time: 5,000 of 10,000 with standard deviation 50.
    counts = [int(((bits >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    assert min(counts) > 4700 and max(counts) < 5300
    assert random_bits(7, 3, 1)[0] == bits[3]
    assert random_bits(7, 3, 2)[0] != bits[3] != random_bits(8, 3, 1)[0]
