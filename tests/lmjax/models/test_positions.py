"""Rotary frequencies and their scalings beside the papers' formulas in float64; slopes of heads."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.models import (
    ALiBi,
    AttentionConfig,
    Batch,
    BlockRotary,
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Rotary,
    YaRNScaling,
)

DIMS = 16
PLACES = np.arange(12)  # float32 angles below 12 are exact to 1e-6 (spacing of float32 at 8 to 16)
TOLERANCE = 2e-6


def at(positions, block_positions=None):
    """A batch with tokens at these positions."""
    positions = jnp.asarray(positions)
    return Batch(positions, positions, positions, block_positions=block_positions)


def usual(base, dims=DIMS):
    """theta_i = base^(-2 i / d) (Su et al. 2021, section 3.2.2)."""
    return [base ** (-2 * i / dims) for i in range(dims // 2)]


def linear(base, lengths, factor):
    """f'(x, m) = f(x, m / s) (Chen et al. 2023, equation 3)."""
    return [[theta / factor for theta in usual(base)]]


def ntk(base, lengths, factor):
    """b' = b s^(d / (d - 2)) (Peng et al. 2023, section 3.1)."""
    return [usual(base * factor ** (DIMS / (DIMS - 2)))]


def dynamic(base, lengths, length):
    """Qwen's factors, counted up: 1 up to `length`, then 3, 7, ... with every doubling."""
    rows = []
    for tokens in lengths:
        factor, reach = 1, length
        while tokens > reach:
            factor, reach = 2 * factor + 1, 2 * reach
        rows += ntk(base, None, factor)
    return rows


def yarn(base, lengths, factor, length, fast=32.0, slow=1.0, attention=None):
    """h(theta) = (1 - gamma) theta / s + gamma theta (Peng et al. 2023, section 3.2).

    gamma is a ramp over the numbers of the pairs, as in the authors' code: from the pair that
    turns `fast` times (rounded down) to the one that turns `slow` times (rounded up).
    """

    def pair(turns):  # of d ln(L / (2 pi turns)) / (2 ln b), from L = 2 pi turns b^(2 i / d)
        return DIMS * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    first, last = max(0, math.floor(pair(fast))), min(DIMS - 1, math.ceil(pair(slow)))
    row = []
    for i, theta in enumerate(usual(base)):
        gamma = 1 if i <= first else 0 if i >= last else 1 - (i - first) / (last - first)
        row.append((1 - gamma) * theta / factor + gamma * theta)
    return [row]


def llama3(base, lengths, factor, length, fast, slow):
    """By wavelength: above length / slow stretched, below length / fast kept, else in between."""
    row = []
    for theta in usual(base):
        wavelength = 2 * math.pi / theta
        if wavelength < length / fast:
            row.append(theta)
        elif wavelength > length / slow:
            row.append(theta / factor)
        else:
            smooth = (length / wavelength - slow) / (fast - slow)
            row.append((1 - smooth) * theta / factor + smooth * theta)
    return [row]


def check(scaling, base, lengths, frequencies, magnitude=1.0):
    """Cosines and sines of every pair, position and row, and so those of the rotated parts."""
    rotary = Rotary(base=base, scaling=scaling)
    positions = np.broadcast_to(PLACES, (len(lengths), len(PLACES)))
    found = rotary.tables(at(positions), jnp.asarray(lengths), DIMS)
    angles = positions[:, :, None, None] * np.array(frequencies)[:, None, None]
    for table, function in zip(found, (np.cos, np.sin)):
        expected = magnitude * function(angles)
        np.testing.assert_allclose(table, expected, rtol=0, atol=TOLERANCE * magnitude)


BASES = st.sampled_from((50.0, 10_000.0, 500_000.0))
FACTORS = st.floats(1.0, 32.0)
LENGTHS = st.integers(8, 10_000)


@settings(max_examples=40)
@given(BASES, FACTORS)
def test_fixed_factors(base, factor):
    check(None, base, [9], [usual(base)])
    check(LinearScaling(factor=factor), base, [9], linear(base, [9], factor))
    check(NTKScaling(factor=factor), base, [9], ntk(base, [9], factor))


@settings(max_examples=40)
@given(BASES, st.integers(1, 300), st.lists(st.integers(1, 3000), min_size=3, max_size=3))
def test_dynamic_ntk_follows_each_rows_length(base, length, lengths):
    scaling = DynamicNTKScaling(length=length)
    check(scaling, base, lengths, dynamic(base, lengths, length))
    edges = [length, length + 1, 2 * length, 2 * length + 1]
    check(scaling, base, edges, dynamic(base, edges, length))


@settings(max_examples=40)
@given(BASES, FACTORS, LENGTHS, st.floats(2.0, 64.0), st.floats(0.1, 1.9))
def test_yarn(base, factor, length, fast, slow):
    scaling = YaRNScaling(factor=factor, length=length, fast=fast, slow=slow)
    expected = yarn(base, [9], factor, length, fast, slow)
    check(scaling, base, [9], expected, 0.1 * math.log(factor) + 1)
    given = YaRNScaling(factor=factor, length=length, fast=fast, slow=slow, attention=0.7)
    check(given, base, [9], expected, 0.7)


@settings(max_examples=40)
@given(BASES, FACTORS, LENGTHS, st.floats(2.0, 64.0), st.floats(0.1, 1.9))
def test_llama3(base, factor, length, fast, slow):
    scaling = Llama3Scaling(factor=factor, length=length, fast=fast, slow=slow)
    check(scaling, base, [9], llama3(base, [9], factor, length, fast, slow))


def test_llama3_of_the_published_models():
    """LLaMA 3.1's: of its 64 pairs 29 are kept, 29 stretched to the full, and 6 in between.

    Pair i turns 8192 / (2 pi) 500000^(-i / 64) times: 4 times at i = 28.22, once at i = 34.98.
    """
    found = Llama3Scaling().frequencies(500_000.0, 128, jnp.ones(1, jnp.int32))[0]
    ratio = np.asarray(found) / np.array(usual(500_000.0, 128))
    kept = np.isclose(ratio, 1, rtol=1e-5)
    stretched = np.isclose(ratio, 1 / 8, rtol=1e-5)
    assert kept.sum() == 29 and kept[:29].all()
    assert stretched.sum() == 29 and stretched[35:].all()


def test_llama3_without_room_between_its_bounds():
    with pytest.raises(UserError, match="slow must be above 0, below fast"):
        Llama3Scaling(slow=4.0, fast=4.0)


def test_rotation_by_hand():
    """Two pairs, halves apart or side by side: x e^(i m theta) as complex numbers."""
    x = np.array([[[[1.0, 2.0, 3.0, 4.0, 5.0]]] * 3], np.float32)  # the fifth is not rotated
    for interleaved, first, second in ((False, [0, 1], [2, 3]), (True, [0, 2], [1, 3])):
        rotary = Rotary(base=100.0, fraction=0.8, interleaved=interleaved)
        tables = rotary.tables(at([[0, 1, 7]]), jnp.asarray([8]), 5)
        found = np.asarray(rotary.rotate(jnp.asarray(x), tables))[0, :, 0]
        for row, place in zip(found, (0, 1, 7)):
            turned = (x[0, 0, 0, first] + 1j * x[0, 0, 0, second]) * np.exp(
                1j * place * np.array([1.0, 0.1])
            )
            np.testing.assert_allclose(row[first], turned.real, rtol=0, atol=1e-5)
            np.testing.assert_allclose(row[second], turned.imag, rtol=0, atol=1e-5)
            assert row[4] == 5


def test_two_rotations_by_hand():
    """The first half of a head turns by position, the second by block position."""
    x = np.random.default_rng(0).normal(size=(1, 4, 1, 8)).astype(np.float32)
    positions, blocks = [[0, 5, 2, 2]], [[0, 0, 1, 2]]
    rotary = BlockRotary(base=100.0)
    tables = rotary.tables(at(positions, jnp.asarray(blocks)), jnp.asarray([4]), 8)
    found = np.asarray(rotary.rotate(jnp.asarray(x), tables))[0, :, 0]
    plain = rotary.tables(at(positions), jnp.asarray([4]), 8)
    outside = np.asarray(rotary.rotate(jnp.asarray(x), plain))[0, :, 0]
    for place in range(4):
        for first, angle in ((0, positions[0][place]), (4, blocks[0][place])):
            pairs = x[0, place, 0, first : first + 2] + 1j * x[0, place, 0, first + 2 : first + 4]
            turned = pairs * np.exp(1j * angle * np.array([1.0, 0.1]))
            expected = np.concatenate([turned.real, turned.imag])
            np.testing.assert_allclose(found[place, first : first + 4], expected, atol=1e-6)
    np.testing.assert_array_equal(outside[:, :4], found[:, :4])
    np.testing.assert_array_equal(outside[:, 4:], x[0, :, 0, 4:])  # no spans: 0 everywhere


def test_slopes_of_some_heads():
    """Of a model that lost heads: theirs among those of all; of another number they are refused."""
    kept = ALiBi().of_heads([0, 5, 7], 8)
    assert kept.slopes == (2.0**-1, 2.0**-6, 2.0**-8)
    assert kept.of_heads([2], 3) == ALiBi(slopes=(2.0**-8,))
    with pytest.raises(UserError, match="slopes has 3 numbers for num_heads=4"):
        AttentionConfig(num_heads=4, positions=kept)
