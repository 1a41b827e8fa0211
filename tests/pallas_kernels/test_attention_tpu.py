"""The forward kernel for TPUs: several tiles and spans, and the memory it touches.

The cases that all implementations share run it too.
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

from pallas_kernels import block_sizes
from pallas_kernels.attention import (
    Mask,
    attention,
    tiles,
    visited,
)
from pallas_kernels.attention.tpu import lowering
from pallas_kernels.attention.tpu.blocks import ForwardBlocks
from pallas_kernels.target import interpreted

SMALL = {"span": 64, "key": 32, "query": 32, "chunk_keys": 16, "chunk_queries": 16, "part": 8}
TOLERANCE = 3e-6  # sums of some 100 float32 numbers of size 1


def on_tpu(*arrays, interpret=True, sizes=SMALL, **settings):
    """The kernel in an interpreter."""
    with interpreted("TPU v5 lite", interpret), block_sizes.using("attention_forward", **sizes):
        return attention(*arrays, **settings, implementation="tpu", return_lse=True)


def formula(*arrays, **settings):
    return attention(*arrays, **settings, implementation="reference", return_lse=True)


def draw(queries, keys, heads=2, kv_heads=1, head_dim=8, value_dim=8, batch=2, seed=0):
    random = np.random.default_rng(seed)
    shapes = (queries, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, value_dim)
    return [jnp.asarray(random.normal(size=(batch, *shape)), jnp.float32) for shape in shapes]


def check(found, expected, tolerance=TOLERANCE):
    (output, lse), (other, other_lse) = found, expected
    np.testing.assert_allclose(output, other, atol=tolerance)
    np.testing.assert_allclose(lse, other_lse, atol=tolerance)  # -inf in the same rows


def packed(*lengths):
    """Segments of documents one after another, the last of them padding."""
    numbers = np.repeat([*range(1, len(lengths)), 0], lengths)
    return np.stack([numbers, numbers[::-1]])


SEGMENTS = packed(40, 70, 1, 60, 10)
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=20),
    "both sides": Mask(window=33),
    "after the keys": Mask(causal=True, window=50, offset=120),
    "traced": Mask(causal=True, window=30, offset=jnp.array(25)),
    "documents": Mask(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS),
}


@pytest.mark.parametrize(
    "name",
    [
        *("full", "after the keys", "traced", "documents"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("causal", "window", "both sides")
        ),
    ],
)
def test_several_spans_of_keys(name):
    """181 keys are three spans, of which some are empty."""
    arrays = draw(181, 181)
    mask = jax.tree.map(jnp.asarray, MASKS[name])
    check(jax.jit(on_tpu)(*arrays, mask), formula(*arrays, mask))


@functools.cache
def any_numbers():
    return jax.jit(on_tpu), jax.jit(formula)


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 70), max_size=6), seed=st.integers(0, 9))
def test_any_segments_and_ranks(cuts, seed):
    """One compiled program for all of them: the lists of tiles are numbers that it is given."""
    random = np.random.default_rng(seed)
    tokens = np.arange(70)
    segments = np.searchsorted(sorted(cuts), tokens, side="right").astype(np.int32)
    ranks = tokens.astype(np.int32) if seed % 2 else random.permutation(tokens).astype(np.int32)
    ranks = np.where(random.random() < 0.5, ranks, np.maximum(ranks, 20))
    mask = Mask(
        causal=True,
        query_segments=segments[None],
        key_segments=segments[None],
        query_ranks=ranks[None],
        key_ranks=ranks[None],
    )
    kernel, reference = any_numbers()
    arrays = draw(70, 70, batch=1, seed=seed)
    check(kernel(*arrays, mask), reference(*arrays, mask))


@pytest.mark.parametrize("factor", [1e2, 1e4])
def test_extreme_logits(factor):
    """Weights of one or two keys alone, and no number that is none."""
    q, k, v = draw(40, 40)
    q = q * factor
    (output, lse), expected = (f(q, k, v, Mask(causal=True), scale=1.0) for f in (on_tpu, formula))
    # A logit of 1e4 is known to 1e-3 in float32, and so is the ratio of two weights.
    np.testing.assert_allclose(output, expected[0], atol=3e-7 * factor * 10)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)
    assert np.isfinite(output).all()


def test_float16_is_not_rounded_to_bfloat16():
    q, k, v = (a.astype(jnp.float16) for a in draw(40, 40))
    output, _ = on_tpu(q, k, v, Mask(causal=True))
    assert output.dtype == jnp.float16
    exact, _ = formula(*(a.astype(jnp.float32) for a in (q, k, v)), Mask(causal=True))
    np.testing.assert_allclose(output, exact, atol=2**-10)  # half a unit of numbers up to 2


def test_what_is_in_empty_tiles_is_not_read():
    segments = packed(64, 32, 96)
    mask = Mask(causal=True, query_segments=segments, key_segments=segments)
    mask = dataclasses.replace(mask, query_segments=segments[:1], key_segments=segments[:1])
    q, k, v = draw(192, 192, batch=1)
    expected = formula(q, k, v, mask)
    k, v = (a.at[:, 96:].set(jnp.nan) for a in (k, v))
    check(on_tpu(q, k, v, mask), expected)


@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_nan_comes_out(which):
    """For every query that sees the key, and for none of tiles before it or of other rows."""
    q, k, v = draw(40, 40)
    broken = (k if which == "keys" else v).at[0, 33, 0, 1].set(jnp.nan)
    k, v = (broken, v) if which == "keys" else (k, broken)
    output, _ = on_tpu(q, k, v, Mask(causal=True))
    assert np.isnan(output[0, 33:, :, 1]).all()
    assert np.isfinite(output[0, :32]).all() and np.isfinite(output[1]).all()


def test_memory_is_used_in_order():
    """Nothing is read that was not written, nor while it is copied: memory begins as NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays = draw(90, 150)
    mask = Mask(causal=True, window=70, offset=60)
    check(on_tpu(*arrays, mask, interpret=careful), formula(*arrays, mask))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("name", MASKS)
def test_lists_have_the_tiles_that_are_not_empty(name):
    mask = jax.tree.map(jnp.asarray, MASKS[name])
    codes, kinds = lowering.tile_codes(mask, 181, 181, 32, 16, 8)
    entries, counts, spans = (np.asarray(a) for a in lowering.tile_lists(codes, 4))
    assert counts.sum() == visited(mask, 181, 181, 32, 16)
    classes = np.asarray(tiles(mask, 181, 181, 32, 16))
    for at in np.ndindex(counts.shape):
        for entry in entries[at][: counts[at]]:
            index, code = spans[at] * 4 + (entry >> 4), entry & 15
            assert classes[(*at[:2], index)] == (2 if code == 1 else 1)
            assert code <= len(kinds)


def test_a_window_walks_over_the_spans_that_it_reaches():
    codes, _ = lowering.tile_codes(Mask(causal=True, window=64), 1024, 1024, 32, 32, 8)
    lists = lowering.tile_lists(codes, 4)  # eight spans of 128 keys
    assert lists.counts.shape == (1, 32, 2)
    assert (lists.spans[0, :, 0] == np.maximum(np.arange(32) - 2, 0) // 4).all()


@pytest.mark.parametrize("window", [None, 5, 40])
def test_parts_cover_what_may_be_seen(window):
    """And those that are called full have no pair that may not."""
    mask = Mask(causal=True, window=window, offset=3)
    codes, kinds = lowering.tile_codes(mask, 90, 77, 32, 16, 8)
    allowed = np.zeros((96, 80), bool)
    allowed[:90, :77] = np.asarray(mask.dense(90, 77))[0, 0]
    for i, j in np.ndindex(*codes.shape[1:]):
        tile = allowed[i * 32 :][:32, j * 16 :][:, :16]
        if codes[0, i, j] == 0:
            assert not tile.any()
            continue
        for key, query in np.ndindex(2, 4):
            part = tile[query * 8 :][:8, key * 8 :][:, :8]
            name = kinds[codes[0, i, j] - 1].parts[key][query]
            assert name == 1 or part[: 90 - i * 32 - query * 8].all() == (name == 2)
            assert name or not part.any()


def runs(jaxpr):
    """Forward kernels of which something is used; XLA leaves out the others."""
    used = {id(one) for one in (*jaxpr.outvars, *(v for e in jaxpr.eqns for v in e.invars))}
    count = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "attention_forward":
            count += any(id(one) in used for one in equation.outvars)
        elif equation.primitive.name != "pallas_call":
            inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
            count += sum(runs(one) for one in inner if hasattr(one, "eqns"))
    return count


def test_a_policy_that_keeps_attention_does_not_run_it_twice():
    arrays = draw(40, 40)

    def kernels(policy):
        def loss(q, k, v):
            call = jax.checkpoint(lambda q, k, v: on_tpu(q, k, v, Mask())[0], policy=policy)
            return jnp.sum(jnp.sin(call(q, k, v)))

        return runs(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays).jaxpr)

    keep = jax.checkpoint_policies.save_only_these_names("attention")
    assert kernels(None) == 2 and kernels(keep) == 1


@pytest.mark.parametrize("kind", ["TPU v3", "TPU v4"])
def test_refusals_say_why(kind):
    q, k, v = draw(16, 16, batch=1)
    with interpreted(kind):
        calls = {
            "it takes up to 512": (jnp.zeros((1, 16, 2, 600)), jnp.zeros((1, 16, 1, 600)), v),
            "float8_e4m3fn, it takes bfloat16": (q.astype(jnp.float8_e4m3fn), k, v),
        }
        if kind == "TPU v3":
            calls = {"it takes TPU v4 and later": (q, k, v)}
        for message, arrays in calls.items():
            with pytest.raises(ValueError, match=message):
                attention(*arrays, Mask(), implementation="tpu")
    with pytest.raises(ValueError, match="it needs a TPU and the device is a cpu"):
        attention(q, k, v, Mask(), implementation="tpu")


@settings(max_examples=200)
@given(
    lengths=st.tuples(st.integers(1, 200_000), st.integers(1, 200_000)),
    dims=st.tuples(st.sampled_from([64, 80, 128, 256, 512]), st.sampled_from([64, 128, 256, 512])),
    number_bytes=st.sampled_from([2, 4]),
    pair_bytes=st.sampled_from([0, 2, 4]),
    row=st.integers(0, len(block_sizes.table()["attention_forward"]) - 1),
)
def test_sizes_fit_any_call(lengths, dims, number_bytes, pair_bytes, row):
    sizes = ForwardBlocks(**block_sizes.table()["attention_forward"][row]["sizes"])
    fitted = sizes.fitted(*lengths, dims, sum(dims) * number_bytes, pair_bytes)
    for larger, smaller in (
        (fitted.span, fitted.key),
        (fitted.key, fitted.chunk_keys),
        (fitted.query, fitted.chunk_queries),
        (fitted.chunk_keys, fitted.part),
        (fitted.chunk_queries, fitted.part),
    ):
        assert larger % smaller == 0 and larger > 0
    for size, length in ((fitted.query, lengths[0]), (fitted.key, lengths[1])):
        assert -(-length // size) * size - length < max(size, 1)
    assert fitted.span * sum(dims) * number_bytes <= 2**22 + 2**21
    assert fitted.span * fitted.query * pair_bytes <= 2**21 + 2**20


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, real or simulated")
def test_each_device_has_its_own_rows():
    """As the models call it: types of arrays that differ between devices are checked."""
    arrays, mask = draw(40, 40), Mask(causal=True)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:2]), ("data",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    with jax.set_mesh(mesh):
        cut = [jax.reshard(a, jax.P("data")) for a in arrays]
        local = functools.partial(on_tpu, mask=mask)
        found = jax.jit(jax.shard_map(local, out_specs=jax.P("data")))(*cut)
    check(found, formula(*arrays, mask))
