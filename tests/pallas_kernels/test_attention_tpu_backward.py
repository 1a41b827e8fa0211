"""Gradients of the TPU kernel over several tiles and spans, against those of the reference.

The small cases of `test_attention_implementations` have one tile; here blocks are of 128, the least
that the kernel takes, and lengths of several.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import BucketBias, Dropout, LinearBias, Mask, Tile
from pallas_kernels.attention.reference import reference
from pallas_kernels.attention.tpu import backward, backward_kernel
from pallas_kernels.attention.tpu.lowering import Rules

TOLERANCE = 1e-5  # of the largest: sums of some 300 float32 numbers
BLOCKS = backward.Blocks(128, 128, 256, 128, 128, transposed=False, vmem=2**24)
TRANSPOSED = dataclasses.replace(BLOCKS, strip=256, edge_strip=256, key=256, transposed=True)


def draw(queries, keys, heads=2, kv_heads=2, head_dim=16, value_dim=16, batch=1):
    """q, k, v and the gradients of output and log-sum-exp."""
    random = np.random.default_rng(queries + keys)
    shapes = [
        (batch, queries, heads, head_dim),
        (batch, keys, kv_heads, head_dim),
        (batch, keys, kv_heads, value_dim),
        (batch, queries, heads, value_dim),
        (batch, queries, heads),
    ]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("blocks", "softcap", "interpret"))
def both(arrays, mask, bias, dropout, blocks, softcap=None, interpret=True):
    """Gradients of q, k, v and the bias by the kernel and by the reference."""
    *qkv, d_output, d_lse = arrays
    given = {"scale": 0.3, "softcap": softcap}

    def apply(q, k, v, bias):
        return reference(q, k, v, mask, bias, **given, dropout=dropout, return_lse=True)

    (output, lse), pull = jax.vjp(apply, *qkv, bias)
    d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0.0)
    rules = Rules(
        **given,
        causal=mask.causal_by_position,
        window=mask.window,
        query_length=qkv[0].shape[1],
        key_length=qkv[1].shape[1],
        dropout=dropout.rate if dropout else 0.0,
        kind="TPU v5 lite",
        interpret=interpret,
    )
    saved = output, lse, d_output, d_lse
    found = backward.gradients(rules, *qkv, mask, bias, dropout, *saved, blocks=blocks)
    return found, pull((d_output, d_lse))


def check(found, expected):
    for name, one, other in zip(("q", "k", "v", "bias"), found, expected):
        if name == "bias":
            one, other = (jax.tree.leaves(a) for a in (one, other))
            if not one:
                continue
            (one,), (other,) = one, other
        other = np.asarray(other)
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one / scale, other / scale, atol=TOLERANCE, err_msg=name)


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def packed(length, *ends):
    """Documents that end there, the last one padding."""
    row = np.searchsorted(np.array(ends), np.arange(length), side="right") + 1
    return jnp.asarray(np.where(row == len(ends) + 1, 0, row)[None], jnp.int32)


def with_segments(queries, keys, **more):
    return Mask(query_segments=queries, key_segments=keys, **more)


RANKS = jnp.asarray(np.maximum(np.arange(390), 150)[None], jnp.int32)
CALLS = {
    "causal": ((390, 390), Mask(causal=True), {}),
    "grouped": ((300, 300, 4, 2), Mask(causal=True, window=140), {}),
    "one_key_head": ((140, 400, 4, 1), Mask(causal=True, offset=260), {}),
    "many_keys_few_queries": ((9, 700), Mask(), {}),
    "many_queries_few_keys": ((600, 9), Mask(window=500), {}),
    "sizes": ((150, 300, 2, 2, 24, 72), Mask(causal=True, offset=jnp.int32(150)), {}),
    "two_sided_window": ((390, 390), Mask(window=100), {}),
    "packed": (
        (390, 390),
        with_segments(*[packed(390, 50, 128, 300, 370)] * 2, causal=True),
        {"softcap": 3.0},
    ),
    "prefix": ((390, 390), Mask(causal=True, query_ranks=RANKS, key_ranks=RANKS), {}),
    "dropout": (
        (300, 300),
        Mask(causal=True),
        {"dropout": Dropout(jax.random.bits(jax.random.key(0), (1, 2, 300), jnp.uint32), 0.2)},
    ),
    "linear": ((300, 300), Mask(causal=True), {"bias": LinearBias(numbers(2))}),
    "buckets": ((300, 400), Mask(), {"bias": BucketBias(numbers(2, 8), 100, False)}),
    "causal_buckets": (
        (200, 300),
        Mask(causal=True, window=170, offset=jnp.int32(90)),
        {"bias": BucketBias(numbers(2, 8), 100, True), "softcap": 2.0},
    ),
    "bias_of_pairs": ((300, 300), Mask(causal=True), {"bias": numbers(1, 2, 300, 300)}),
    "bias_of_keys": ((300, 300), Mask(causal=True), {"bias": numbers(1, 1, 1, 300)}),
    "bias_of_queries": ((300, 300), Mask(causal=True), {"bias": numbers(1, 2, 300, 1)}),
    "bias_of_heads": ((300, 300), Mask(causal=True), {"bias": numbers(1, 2, 1, 1)}),
}


@pytest.mark.parametrize("blocks", [BLOCKS, TRANSPOSED], ids=["plain", "transposed"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_over_several_tiles(name, blocks):
    sizes, mask, more = CALLS[name]
    given = {"bias": None, "dropout": None, **more}
    check(*both(draw(*sizes), mask, **given, blocks=blocks))


@st.composite
def numbers_of_tokens(draw, length):
    """Segments with padding somewhere, and ranks: positions, prefixes or a permutation."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    cuts = np.sort(random.integers(0, length, draw(st.integers(0, 6))))
    segments = np.searchsorted(cuts, np.arange(length), side="right")
    ranks = {
        "positions": np.arange(length),
        "prefix": np.maximum(np.arange(length), random.integers(0, length)),
        "permutation": random.permutation(length),
    }[draw(st.sampled_from(["positions", "prefix", "permutation"]))]
    return jnp.asarray(segments[None], jnp.int32), jnp.asarray(ranks[None], jnp.int32)


ARRAYS = draw(260, 260, heads=2, kv_heads=1, head_dim=8, value_dim=8)


@settings(max_examples=12, deadline=None)
@given(numbers=numbers_of_tokens(260), seed=st.integers(0, 9))
def test_gradients_of_any_segments_and_ranks(numbers, seed):
    """One compiled program for all of them: classes of tiles are numbers that it is given."""
    segments, ranks = numbers
    mask = with_segments(segments, segments, causal=True, query_ranks=ranks, key_ranks=ranks)
    found, expected = both(ARRAYS, mask, None, None, blocks=BLOCKS)
    check(found, expected)
    for one, other in zip(found[:3], expected):
        assert not np.asarray(one)[np.asarray(other) == 0].any()  # forbidden: exactly nothing


@settings(max_examples=12, deadline=None)
@given(offset=st.integers(-300, 300))
def test_gradients_at_any_offset(offset):
    mask = Mask(causal=True, window=150, offset=jnp.int32(offset))
    check(*both(ARRAYS, mask, None, None, blocks=BLOCKS))


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_half_precision(dtype):
    arrays = draw(200, 200)
    half = [a.astype(dtype) for a in arrays[:4]] + arrays[4:]
    found, _ = both(half, Mask(causal=True), None, None, blocks=BLOCKS)
    exact = [a.astype(jnp.float32) for a in half]
    _, expected = both(exact, Mask(causal=True), None, None, blocks=BLOCKS)
    for one, other in zip(found[:3], expected):
        assert one.dtype == dtype
        # 8 bits of mantissa: weights, their gradients and the output of the forward are rounded.
        error = np.abs(np.asarray(one, np.float32) - other).max()
        assert error < 4 * 2**-8 * np.abs(other).max()


def test_twice_gives_the_same_bits():
    first, second = (both(draw(300, 300, 4, 2), Mask(), None, None, BLOCKS)[0] for _ in range(2))
    for one, other in zip(first[:3], second):
        np.testing.assert_array_equal(one, other)


def test_what_is_in_empty_tiles_is_not_read():
    """Keys that no tile with a pair has may be anything."""
    arrays = draw(384, 384)
    segments = packed(384, 128, 256)
    mask = with_segments(segments, segments, causal=True)
    _, expected = both(arrays, mask, None, None, blocks=BLOCKS)
    q, k, v, *rest = arrays
    broken = [q, *(a.at[:, 256:].set(jnp.nan) for a in (k, v)), *rest]
    kernel_only = functools.partial(both, bias=None, dropout=None, blocks=BLOCKS)
    # The reference reads everything: its output and log-sum-exp are those of whole keys.
    del kernel_only
    rules = Rules(0.3, None, True, None, 384, 384, 0.0, "TPU v5 lite", True)
    output, lse = reference(q, k, v, mask, scale=0.3, return_lse=True)
    d_lse = jnp.where(jnp.isfinite(lse), rest[1], 0.0)
    saved = output, lse, rest[0], d_lse
    found = backward.gradients(rules, *broken[:3], mask, None, None, *saved, blocks=BLOCKS)
    check(found[:3], expected[:3])


@pytest.mark.parametrize("blocks", [BLOCKS, TRANSPOSED], ids=["plain", "transposed"])
def test_memory_is_used_in_order(blocks):
    """Nothing is read that was not written, nor while it is copied: memory begins as NaN."""
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays = draw(300, 520, heads=2, kv_heads=1)
    mask = Mask(causal=True, offset=220)
    found, expected = both(arrays, mask, None, None, blocks=blocks, interpret=careful)
    check(found, expected)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_strips_cover_what_may_be_seen():
    """By position, for tiles at every distance from the diagonal."""
    rules = Rules(1.0, None, True, 700, 4096, 4096, 0.0, "TPU v5 lite", False)
    mask = Mask(causal=True, window=700)
    blocks = backward.Blocks(512, 512, 4096, 512, 128, transposed=False, vmem=2**24)
    walk, codes = backward.plan(rules, mask, None, blocks)
    allowed = np.asarray(mask.dense(4096, 4096))[0, 0]
    for i, j in np.ndindex(8, 8):
        covered = np.zeros((512, 512), bool)
        if code := codes[0, i, 0, 0, j]:
            for strip in backward_kernel.strips(walk, walk.kinds[code - 1]):
                keys = slice(strip.key, strip.key + strip.keys)
                assert not covered[strip.queries, keys].any()
                covered[strip.queries, keys] = True
                part = allowed[i * 512 :][strip.queries, j * 512 :][:, keys]
                assert part.any() and (strip.tile == Tile.PARTIAL or part.all())
        assert not (allowed[i * 512 :, j * 512 :][:512, :512] & ~covered).any()
    assert codes[0, :, 0, 0, -1].sum() == (codes[..., :-1] != 0).sum()
