"""Gradients of the TPU kernel over several tiles and spans, against those of the reference.

The blocks are far smaller than a chip takes, so that short lengths have several.
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

from pallas_kernels import topologies
from pallas_kernels.attention import BucketBias, Dropout, LinearBias, Mask, Tile, attention
from pallas_kernels.attention.reference import reference
from pallas_kernels.attention.tpu import backward, backward_kernel
from pallas_kernels.attention.tpu.backward_blocks import BackwardBlocks, backward_blocks, has_pairs
from pallas_kernels.attention.tpu.lowering import Rules
from pallas_kernels.target import interpreted

TOLERANCE = 1e-5  # of the largest: sums of some 300 float32 numbers
BLOCKS = BackwardBlocks(16, 16, 32, 16, 8, transposed=0, memory=16, part=8)
TRANSPOSED = dataclasses.replace(BLOCKS, key=32, strip=32, edge_strip=16, transposed=1)


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
    blocks = blocks.fitted(rules.query_length, rules.key_length, 1, has_pairs(bias))
    saved = output, lse, d_output, d_lse
    found = backward.gradients(rules, blocks, *qkv, mask, bias, dropout, *saved)
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


RANKS = jnp.asarray(np.maximum(np.arange(49), 19)[None], jnp.int32)
SEEDS = jax.random.bits(jax.random.key(0), (1, 2, 38), jnp.uint32)
CALLS = {
    "causal": ((49, 49), Mask(causal=True), {}),
    "grouped": ((38, 38, 4, 2), Mask(causal=True, window=18), {}),
    "one_key_head": ((18, 50, 4, 1), Mask(causal=True, offset=32), {}),
    "many_keys_few_queries": ((3, 88), Mask(), {}),
    "many_queries_few_keys": ((75, 3), Mask(window=60), {}),
    "sizes": ((19, 38, 2, 2, 24, 72), Mask(causal=True, offset=jnp.int32(19)), {}),
    "two_sided_window": ((49, 49), Mask(window=12), {}),
    "packed": (
        (49, 49),
        with_segments(*[packed(49, 7, 16, 37, 46)] * 2, causal=True),
        {"softcap": 3.0},
    ),
    "prefix": ((49, 49), Mask(causal=True, query_ranks=RANKS, key_ranks=RANKS), {}),
    "dropout": ((38, 38), Mask(causal=True), {"dropout": Dropout(SEEDS, 0.2)}),
    "linear": ((38, 38), Mask(causal=True), {"bias": LinearBias(0.2 * numbers(2))}),
    "buckets": ((38, 50), Mask(), {"bias": BucketBias(numbers(2, 8), 20, False)}),
    "causal_buckets": (
        (25, 38),
        Mask(causal=True, window=21, offset=jnp.int32(11)),
        {"bias": BucketBias(numbers(2, 8), 20, True), "softcap": 2.0},
    ),
    "bias_of_pairs": ((38, 38), Mask(causal=True), {"bias": numbers(1, 2, 38, 38)}),
    "bias_of_keys": ((38, 38), Mask(causal=True), {"bias": numbers(1, 1, 1, 38)}),
    "bias_of_queries": ((38, 38), Mask(causal=True), {"bias": numbers(1, 2, 38, 1)}),
    "bias_of_heads": ((38, 38), Mask(causal=True), {"bias": numbers(1, 2, 1, 1)}),
}


# What the transposed blocks are computed with, too: shapes, masks, and each kind of bias.
BOTH = (
    *("causal", "one_key_head", "many_keys_few_queries", "packed", "prefix", "dropout"),
    *("causal_buckets", "bias_of_pairs"),
)


PARTS = {"causal", "grouped", "two_sided_window", "prefix", "linear", "buckets"}  # of others


@pytest.mark.parametrize(
    ("name", "blocks"),
    [pytest.param(name, BLOCKS, marks=[pytest.mark.slow] * (name in PARTS)) for name in CALLS]
    + [pytest.param(name, TRANSPOSED, marks=pytest.mark.slow) for name in BOTH],
    ids=lambda value: value if isinstance(value, str) else f"transposed={value.transposed}",
)
def test_gradients_over_several_tiles(name, blocks):
    sizes, mask, more = CALLS[name]
    given = {"bias": None, "dropout": None, **more}
    check(*both(draw(*sizes), mask, **given, blocks=blocks))


@pytest.mark.parametrize("name", ["grouped", "one_key_head"])
def test_query_heads_of_a_key_head_on_two_cores(name):
    sizes, mask, _ = CALLS[name]
    check(*both(draw(*sizes), mask, None, None, dataclasses.replace(BLOCKS, shares=2)))


def test_cores_without_a_key_head_share_the_query_heads():
    def shares(chip, batch, heads, kv_heads):
        q, k = (jnp.zeros((batch, 128, n, 64), jnp.bfloat16) for n in (heads, kv_heads))
        return backward_blocks(chip, q, k, k, Mask(), None).shares

    assert shares("TPU v4", 1, 8, 1) == shares("TPU v5", 3, 6, 3) == 2
    assert shares("TPU v4", 2, 8, 1) == shares("TPU v4", 1, 8, 2) == 1  # enough for both
    assert shares("TPU v4", 1, 3, 1) == shares("TPU v5 lite", 1, 8, 1) == 1  # it cannot, one core


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


ARRAYS = draw(33, 33, heads=2, kv_heads=1, head_dim=8, value_dim=8)


@settings(max_examples=12, deadline=None)
@given(numbers=numbers_of_tokens(33), seed=st.integers(0, 9))
def test_gradients_of_any_segments_and_ranks(numbers, seed):
    """One compiled program for all of them: classes of tiles are numbers that it is given."""
    segments, ranks = numbers
    mask = with_segments(segments, segments, causal=True, query_ranks=ranks, key_ranks=ranks)
    found, expected = both(ARRAYS, mask, None, None, blocks=BLOCKS)
    check(found, expected)
    for one, other in zip(found[:3], expected):
        assert not np.asarray(one)[np.asarray(other) == 0].any()  # forbidden: exactly nothing


@settings(max_examples=12, deadline=None)
@given(offset=st.integers(-40, 40))
def test_gradients_at_any_offset(offset):
    mask = Mask(causal=True, window=19, offset=jnp.int32(offset))
    check(*both(ARRAYS, mask, None, None, blocks=BLOCKS))


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_half_precision(dtype):
    arrays = draw(38, 38)
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
    first, second = (both(draw(38, 38, 4, 2), Mask(), None, None, BLOCKS)[0] for _ in range(2))
    for one, other in zip(first[:3], second):
        np.testing.assert_array_equal(one, other)


def test_what_is_in_empty_tiles_is_not_read():
    """Keys that no tile with a pair has may be anything."""
    arrays = draw(48, 48)
    segments = packed(48, 16, 32)
    mask = with_segments(segments, segments, causal=True)
    expected = both(arrays, mask, None, None, blocks=BLOCKS)[0]
    # What the reference returns for whole keys is the same, of the queries that see any.
    broken = [arrays[0], *(a.at[:, 32:].set(jnp.nan) for a in arrays[1:3]), *arrays[3:]]
    output, lse = reference(*arrays[:3], mask, scale=0.3, return_lse=True)
    rules = Rules(0.3, None, True, None, 48, 48, 0.0, "TPU v5 lite", True)
    saved = output, lse, broken[3], jnp.where(jnp.isfinite(lse), broken[4], 0.0)
    found = backward.gradients(rules, BLOCKS, *broken[:3], mask, None, None, *saved)
    check(found[:3], expected[:3])


@pytest.mark.parametrize("blocks", [BLOCKS, TRANSPOSED], ids=["plain", "transposed"])
def test_memory_is_used_in_order(blocks):
    """Nothing is read that was not written, nor while it is copied: memory begins as NaN."""
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays = draw(38, 65, heads=2, kv_heads=1)
    mask = Mask(causal=True, offset=27)
    found, expected = both(arrays, mask, None, None, blocks=blocks, interpret=careful)
    check(found, expected)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_strips_cover_what_may_be_seen():
    """By position, for tiles at every distance from the diagonal."""
    rules = Rules(1.0, None, True, 700, 4096, 4096, 0.0, "TPU v5 lite", False)
    mask = Mask(causal=True, window=700)
    blocks = BackwardBlocks(512, 512, 4096, 512, 128, transposed=0, memory=16)
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


def compiled(chip, length, heads=2, kv_heads=2, bias=None, dtype=jnp.bfloat16, **mask):
    """Output and gradients of causal attention, compiled for a chip that is not here."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the extra lmjax[tpu]")
    device = topologies.tpu(chip)[0]
    where = jax.sharding.SingleDeviceSharding(device)

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(q, k, v, bias, segments):
        if segments is not None:
            mask.update(query_segments=segments, key_segments=segments)
        given = BucketBias(bias, 128, True) if bias is not None and bias.ndim == 2 else bias
        output = attention(q, k, v, Mask(causal=True, **mask), given, implementation="tpu")
        return jnp.sum(output.astype(jnp.float32))

    segments = shaped(1, length, dtype=jnp.int32) if mask.pop("segments", False) else None
    q, k = shaped(1, length, heads, 128), shaped(1, length, kv_heads, 128)
    bias = None if bias is None else shaped(*bias, dtype=jnp.float32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    with interpreted(device.device_kind, interpret=False):
        return gradient.lower(q, k, k, bias, segments).compile()


REQUESTS = {
    "causal": {"length": 2048},
    "grouped": {"length": 1100, "heads": 4, "kv_heads": 1, "window": 700},
    "packed": {"length": 1024, "segments": True},
    "buckets": {"length": 1024, "bias": (2, 32)},
    "bias_of_pairs": {"length": 1024, "bias": (1, 2, 1024, 1024)},
    "float32": {"length": 512, "dtype": jnp.float32},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "name"),
    [(chip, name) for chip in ("v4", "v6e") for name in REQUESTS]
    + [("v5e", "causal"), ("v5p", "grouped")],
)
def test_compiles_for_chips_that_are_not_here(chip, name):
    assert "attention_backward" in compiled(chip, **REQUESTS[name]).as_text()


@pytest.mark.slow
def test_memory_is_linear_in_length():
    """From one span of keys to sixteen; it would be 64 times as much as 16 if it were a square."""
    lengths = 2**11, 2**13, 2**17

    def bytes_of(length):
        analysis = compiled("v5e", length, heads=1, kv_heads=1).memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    least, *more = (bytes_of(length) / length for length in lengths)
    assert max(more) < 3 * least  # with several spans the gradient of the queries is in float32
    assert max(more) < 1.2 * min(more)
