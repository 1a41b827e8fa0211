"""The forward kernel for TPUs: several tiles and spans, the memory it touches, and its compilation
for chips that are not there. The cases that all implementations share run it too."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import block_sizes
from pallas_kernels.attention import (
    BucketBias,
    Dropout,
    LinearBias,
    Mask,
    attention,
    tiles,
    visited,
)
from pallas_kernels.attention.tpu import lowering
from pallas_kernels.attention.tpu.blocks import Blocks
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


@pytest.mark.parametrize("name", MASKS)
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


def test_lists_have_the_tiles_that_are_not_empty():
    mask = jax.tree.map(jnp.asarray, MASKS["documents"])
    codes, kinds = lowering.tile_codes(mask, 181, 181, 32, 16, 8)
    entries, counts = lowering.tile_lists(codes, 4)
    assert counts.sum() == visited(mask, 181, 181, 32, 16)
    classes = np.asarray(tiles(mask, 181, 181, 32, 16))
    for at in np.ndindex(counts.shape):
        found = np.asarray(entries[at])[: counts[at]]
        for entry in found:
            code = entry & 15
            assert classes[(*at[:2], at[2] * 4 + (entry >> 4))] == (2 if code == 1 else 1)
            assert code <= len(kinds)


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
    sizes = Blocks(**block_sizes.table()["attention_forward"][row]["sizes"])
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


# What follows compiles for chips that are described, with libtpu.

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
CHIPS = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
}
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="needs the extra tpu: it compiles for chips that are not there"
)


def described(chip):
    """A mesh of four chips, which no machine needs to have."""
    name, settings = CHIPS[chip]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    mesh = topologies.make_mesh(topology, (2, 2), ("data", "tensor"))
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)


def compiled(chip, make, q, k, v, **more):
    """`attention` on a described mesh, batch and heads cut, compiled; `make` gives its settings."""
    mesh = described(chip)
    specs = {name: P("data", None, "tensor", None) for name in "qkv"}
    specs |= {name: spec for name, (_, spec) in more.items()}
    shapes = {"q": q, "k": k, "v": v} | {name: shape for name, (shape, _) in more.items()}

    def local(arrays):
        q, k, v = (arrays[name] for name in "qkv")
        return attention(q, k, v, implementation="tpu", **make(arrays))

    with jax.set_mesh(mesh):
        arguments = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, specs[name]))
            for name, a in shapes.items()
        }
        call = jax.shard_map(local, in_specs=(specs,), out_specs=specs["q"])
        return jax.jit(call).lower(arguments).compile()


def shapes(length, heads=4, kv_heads=4, head_dim=128, value_dim=None, dtype=jnp.bfloat16):
    """q, k and v of a batch of two."""
    return [
        jax.ShapeDtypeStruct((2, length, count, dim), dtype)
        for count, dim in (
            (heads, head_dim),
            (kv_heads, head_dim),
            (kv_heads, value_dim or head_dim),
        )
    ]


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip):
    program = compiled(chip, lambda _: {"mask": Mask(causal=True)}, *shapes(1024, 8, 4))
    assert "attention_forward" in program.as_text()


INTEGERS = {"dtype": jnp.int32}
OPTIONS = {
    "documents": (
        lambda a: {"mask": Mask(causal=True, query_segments=a["s"], key_segments=a["s"])},
        {"s": (jax.ShapeDtypeStruct((2, 1000), jnp.int32), P("data", None))},
    ),
    "ranks": (
        lambda a: {"mask": Mask(causal=True, query_ranks=a["s"], key_ranks=a["s"], window=99)},
        {"s": (jax.ShapeDtypeStruct((2, 1000), jnp.int32), P("data", None))},
    ),
    "offset": (
        lambda a: {"mask": Mask(causal=True, window=300, offset=a["o"])},
        {"o": (jax.ShapeDtypeStruct((), jnp.int32), P())},
    ),
    "linear bias": (
        lambda a: {"mask": Mask(causal=True), "bias": LinearBias(a["slopes"])},
        {"slopes": (jax.ShapeDtypeStruct((4,), jnp.float32), P("tensor"))},
    ),
    "buckets, softcap": (
        lambda a: {"mask": Mask(), "bias": BucketBias(a["table"], 128, False), "softcap": 30.0},
        {"table": (jax.ShapeDtypeStruct((4, 32), jnp.float32), P("tensor", None))},
    ),
    "array": (
        lambda a: {"mask": Mask(), "bias": a["bias"]},
        {
            "bias": (
                jax.ShapeDtypeStruct((1, 4, 1000, 1000), jnp.bfloat16),
                P(None, "tensor", None, None),
            )
        },
    ),
    "array of keys": (
        lambda a: {"mask": Mask(causal=True), "bias": a["bias"]},
        {
            "bias": (
                jax.ShapeDtypeStruct((2, 1, 1, 1000), jnp.float32),
                P("data", None, None, None),
            )
        },
    ),
    "dropout": (
        lambda a: {"mask": Mask(causal=True), "dropout": Dropout(a["seeds"], 0.1)},
        {"seeds": (jax.ShapeDtypeStruct((2, 4, 1000), jnp.uint32), P("data", "tensor", None))},
    ),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_with_every_option(name, chip):
    make, more = OPTIONS[name]
    compiled(chip, make, *shapes(1000), **more)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "head",
    [
        {"head_dim": 64},
        {"head_dim": 80},
        {"head_dim": 96},
        {"head_dim": 256},
        {"head_dim": 512},
        {"head_dim": 192, "value_dim": 128},
        {"head_dim": 128, "dtype": jnp.float32},
        {"head_dim": 256, "dtype": jnp.float32},
        {"head_dim": 128, "dtype": jnp.float16},
    ],
    ids=str,
)
def test_compiles_for_every_head(head, chip):
    compiled(chip, lambda _: {"mask": Mask(causal=True)}, *shapes(4096, **head))


@needs_libtpu
@pytest.mark.slow
def test_memory_is_linear_in_length():
    """Of 2k to 128k tokens the program holds the arrays and copies of them."""

    def temporary(length):
        program = compiled("v5e", lambda _: {"mask": Mask(causal=True)}, *shapes(length, 2, 2))
        return program.memory_analysis().temp_size_in_bytes / length

    first, *others = (temporary(length) for length in (8192, 32768, 131072))
    assert all(other < 1.5 * first for other in others)
