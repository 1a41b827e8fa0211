"""Decode attention: every implementation, over every form of cache, against loops in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import CannotServe
from pallas_kernels.decode_attention import PagedCache, decode_attention, quantize
from pallas_kernels.target import interpreted
from tests.pallas_kernels.decode_cases import DecodeCase

IMPLEMENTATIONS = ["reference", "chunked", "tpu"]  # and the one for CPUs, of one token a row
CASES = {
    "free and stopped rows": DecodeCase((0, 5, 64), late=(0, 1, 0)),
    "all rows free": DecodeCase((0, 0)),
    "several tokens": DecodeCase((4, 19, 64), new=4, late=(0, 2, 0)),
    "more tokens than the row has": DecodeCase((2, 40), new=5),
    "one head group": DecodeCase((33, 8), heads=8, kv_heads=1, head_dim=128),
    "no groups": DecodeCase((33, 8), heads=4, kv_heads=4, head_dim=32),
    "wide groups": DecodeCase((33, 64), heads=8, kv_heads=4, head_dim=128, new=2),
    "other value size": DecodeCase((33, 64), head_dim=128, value_dim=64),
    "odd head size": DecodeCase((33, 64), head_dim=80, heads=6, kv_heads=2),
    "window": DecodeCase((3, 40, 64), window=9, new=3),
    "ring": DecodeCase((3, 32, 33, 95), window=32, slots=32),
    "ring, several tokens": DecodeCase((3, 32, 33, 95), window=20, slots=32, new=4),
    "layers": DecodeCase((3, 40), layers=3),
    "softcap": DecodeCase((3, 40), softcap=2.0),
    "sinks": DecodeCase((0, 3, 40), sinks=True),
    "linear bias": DecodeCase((3, 40), bias="linear", new=2),
    "bias of buckets": DecodeCase((3, 40), bias="buckets", new=2),
    "pages": DecodeCase((0, 3, 16, 33, 64), page=16),
    "pages, several tokens": DecodeCase((6, 33, 64), page=8, new=5, window=30, softcap=3.0),
    "pages and a bias": DecodeCase((6, 33, 64), page=8, bias="linear"),
    "int8 pages": DecodeCase((0, 3, 130, 256), int8=True, slots=256, page=128, new=2),
    "int8 layers": DecodeCase((3, 400), int8=True, slots=512, layers=2, heads=16, kv_heads=4),
    "int8 of bfloat16": DecodeCase((3, 200), int8=True, slots=256, dtype=jnp.bfloat16, new=3),
    "bfloat16 pages": DecodeCase((3, 40, 64), dtype=jnp.bfloat16, page=16, head_dim=128, new=2),
}


def compiled(case: DecodeCase, implementation: str | None):
    """The outputs and log-sum-exps of one program: operation by operation, each is compiled."""
    arguments, options = case.arguments()
    options |= {"implementation": implementation, "return_lse": True}
    return jax.jit(lambda *arguments: decode_attention(*arguments, **options))(*arguments)


def run(case: DecodeCase, implementation: str):
    with interpreted("TPU v5 lite"):
        return compiled(case, implementation)


def run_on_cpu(case: DecodeCase):
    return compiled(case, "cpu")


def agree(case: DecodeCase, found) -> None:
    """In float32 sums of up to 256 products round by 1e-6 or so; in bfloat16 the weights and the
    output do, by 2**-8 of numbers of about 1."""
    tolerance = 2e-5 if case.dtype == jnp.float32 else 2e-2
    for ours, exact in zip(found, case.expected(), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), exact, rtol=tolerance, atol=tolerance
        )


def drawn(draw, new: int) -> DecodeCase:
    """A case of any form, lengths, window and groups."""
    form = draw(st.sampled_from(["rows", "ring", "pages"]))
    window = draw(st.none() | st.integers(1, 40)) if form != "ring" else draw(st.integers(1, 26))
    longest = 90 if form == "ring" else 64
    return DecodeCase(
        tuple(draw(st.lists(st.integers(0, longest), min_size=2, max_size=2))),
        new=new,
        heads=4,
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([64, 128])),
        slots=32 if form == "ring" else 64,
        page=draw(st.sampled_from([8, 16])) if form == "pages" else None,
        window=window,
        softcap=draw(st.sampled_from([None, 2.0])),
        bias=draw(st.sampled_from([None, "linear", "buckets"])),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


# By the interpreter, which takes long, these are among the slow tests: others have their parts.
PARTS = {"all rows free", "one head group", "no groups", "other value size", "window", "ring"}
PARTS |= {"layers", "softcap", "linear bias", "pages", "bfloat16 pages", "int8 layers"}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(
            *(name, implementation),
            marks=[pytest.mark.slow] * (implementation == "tpu" and name in PARTS),
        )
        for name in CASES
        for implementation in IMPLEMENTATIONS
    ],
)
def test_against_loops(name, implementation):
    agree(CASES[name], run(CASES[name], implementation))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.new == 1])
def test_on_a_cpu_against_loops(name):
    agree(CASES[name], run_on_cpu(CASES[name]))


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_on_a_cpu_any_lengths_and_options(data):
    case = drawn(data.draw, new=1)
    agree(case, run_on_cpu(case))


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 20}, {"window": 7, "softcap": 2.0}, {"bias": "linear"}, {"int8": True}],
    ids=str,
)
def test_on_a_cpu_long_rows_by_their_pages(options, monkeypatch):
    """Pages of three in a call, of which the last reaches over the table's end; an empty row."""
    monkeypatch.setattr("pallas_kernels.decode_attention.cpu.OF_A_ROW", 24)
    case = DecodeCase((0, 1, 24, 25, 64, 7), page=8, **options)
    agree(case, run_on_cpu(case))


@given(st.data())
@settings(max_examples=4, deadline=None)
def test_any_lengths_and_options(data):
    """Rows, rings and pages of random lengths, windows, groups and numbers of tokens."""
    case = drawn(data.draw, data.draw(st.integers(1, 6)))
    for implementation in IMPLEMENTATIONS[1:]:
        agree(case, run(case, implementation))


def test_many_steps_and_two_splits(monkeypatch):
    """Rows of many steps of the kernel, split over the cores of a v4, where steps end in parts."""
    monkeypatch.setattr("pallas_kernels.decode_attention.tpu.SCORES", 8 * 32)
    case = DecodeCase((0, 90, 128, 7), slots=128, page=16, new=2)
    with interpreted("TPU v4"):
        agree(case, compiled(case, "tpu"))


@pytest.mark.parametrize("form", [{"page": 16}, {}, {"window": 30}])
def test_by_the_interpreter_of_copies(form):
    """Copies, waits and scratch memory full of NaN as on a chip; no two accesses race."""
    case = DecodeCase((0, 40, 64, 3), new=2, **form)
    arguments, options = case.arguments()
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    options |= {"implementation": "tpu", "return_lse": True}
    with interpreted("TPU v4", careful):
        found = jax.jit(functools.partial(decode_attention, **options))(*arguments)
    agree(case, found)
    assert not interpret_pallas_call.races.races_found


def test_several_tokens_equal_one_at_a_time():
    """A draft's tokens checked at once have the outputs of being decoded one after another."""
    case = DecodeCase((40, 23), new=3, window=17, slots=64)
    (q, cache, *_), options = case.arguments()
    decode = jax.jit(functools.partial(decode_attention, **options))
    at_once, lengths = decode(q, cache), np.asarray(cache.lengths)
    for index in range(3):
        shorter = dataclasses.replace(cache, lengths=jnp.asarray(lengths - 2 + index))
        one = decode(np.asarray(q)[:, index : index + 1], shorter)
        np.testing.assert_allclose(one[:, 0], at_once[:, index], rtol=1e-5, atol=1e-6)


def test_int8_loses_little():
    """Half a step of 127 of the largest number at most."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 16))
    steps, scales = quantize(x)
    error = np.abs(np.asarray(steps * scales[..., None] - x))
    assert (error <= np.asarray(scales)[..., None] * 0.501).all()
    assert np.isnan(quantize(x.at[1, 2, 0, 3].set(jnp.nan))[1][1, 2, 0])
    assert quantize(jnp.zeros((1, 2, 4)))[0].sum() == 0


def call(case: DecodeCase, implementation=None, **changes):
    (q, cache, first, bias), options = case.arguments()
    cache = dataclasses.replace(cache, **{k: v for k, v in changes.items() if k != "q"})
    return decode_attention(
        changes.get("q", q), cache, first, bias, **options, implementation=implementation
    )


def test_page_tables_that_point_outside():
    case = DecodeCase((6, 33), page=16)
    table = np.zeros((2, 4), np.int32)
    table[1, 2] = 9
    with pytest.raises(
        ValueError, match=r"page_table\[1, 2\] is 9, and the cache has pages 0 to 5"
    ):
        call(case, page_table=jnp.asarray(table))
    table[1, 2:] = 0, 9  # past the row's end nothing is read
    call(case, page_table=jnp.asarray(table))
    with pytest.raises(ValueError, match="row 1 has 65 tokens, more than the 4 pages of 16 tokens"):
        call(case, lengths=jnp.array([6, 65]))
    with pytest.raises(ValueError, match="lengths below 0"):
        call(case, lengths=jnp.array([6, -1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_jit_nothing_outside_is_read(implementation):
    """Numbers that cannot be checked are cut off: the result is some row's, and a number."""
    (q, cache, *_), options = DecodeCase((6, 33), page=16).arguments()
    cache = PagedCache(
        jnp.ones_like(cache.keys),
        jnp.ones_like(cache.values),
        jnp.full_like(cache.page_table, 1_000_000),
        jnp.array([6, 1_000_000], jnp.int32),
    )
    with interpreted("TPU v5 lite"):
        found = jax.jit(
            lambda q, cache: decode_attention(q, cache, **options, implementation=implementation)
        )(q, cache)
    assert np.isfinite(found).all()


def test_rings_need_a_window():
    with pytest.raises(ValueError, match="row 1 has 70 tokens, more than the 64 slots"):
        call(DecodeCase((3, 70), slots=64))
    with pytest.raises(ValueError, match=r"window=64 and new=2"):
        call(DecodeCase((3, 70), slots=64, window=64, new=2))


def test_what_does_not_fit():
    case = DecodeCase((3, 40))
    q = case.arguments()[0][0]
    with pytest.raises(ValueError, match=r"3 rows of queries, but .*'lengths': 2"):
        call(case, q=jnp.concatenate([q, q[:1]]))
    with pytest.raises(ValueError, match="give keys of kv_heads"):
        call(case, q=q[:, :, :3])
    with pytest.raises(ValueError, match="give int8 and both scales"):
        call(case, key_scales=jnp.ones((2, 2, 64)))
    with pytest.raises(ValueError, match=r"scales .*, give \(2, 2, 256\)"):
        int8 = DecodeCase((3, 40), int8=True, slots=256)
        call(int8, key_scales=jnp.ones((2, 1, 256)), value_scales=jnp.ones((2, 1, 256)))
    with pytest.raises(ValueError, match="'cuda' is not one of reference, chunked, cpu, tpu"):
        call(case, "cuda")
    with pytest.raises(CannotServe, match="it needs a TPU and the device is a cpu"):
        call(case, "tpu")
    with pytest.raises(CannotServe, match="it takes one new token a row, not 2"):
        call(DecodeCase((3, 40), new=2), "cpu")
    with interpreted("TPU v5 lite"), pytest.raises(CannotServe, match="the device is a tpu"):
        call(case, "cpu")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (DecodeCase((3,), slots=60), "60 tokens in a row of float32, it takes a multiple of 8"),
        (DecodeCase((3,), dtype=jnp.float16), "dtype float16 of the queries"),
        (DecodeCase((3,), new=17), "17 new tokens a row, it takes up to 16"),
        (DecodeCase((3,), page=64, int8=True), "64 tokens in a page of int8, .* multiple of 128"),
    ],
)
def test_refusals_of_the_kernel(case, reason):
    with interpreted("TPU v5 lite"):
        with pytest.raises(CannotServe, match=reason):
            call(case, "tpu")
        compiled(case, None)  # another implementation serves


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_sharded_over_rows_and_heads(implementation):
    case = DecodeCase((3, 40, 64, 17), heads=8, kv_heads=4, head_dim=128)
    (q, cache, *_), options = case.arguments()
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))

    def cut(a):
        spec = jax.P("data", None, "tensor") if a.ndim > 1 else jax.P("data")
        return jax.device_put(a, jax.NamedSharding(mesh, spec))

    q, cache = jax.tree.map(cut, (q, cache))

    def local(q, cache):
        return decode_attention(q, cache, **options, implementation=implementation)

    with interpreted("TPU v5 lite"):
        divided = jax.shard_map(
            local,
            mesh=mesh,
            out_specs=jax.P("data", None, "tensor"),
            check_vma=implementation != "tpu",  # of the interpreter, which loses the types
        )
        found = jax.jit(divided)(q, cache)
    agree(case, [found, case.expected()[1]])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
def test_long_rows_by_their_pages_sharded_over_heads(monkeypatch):
    monkeypatch.setattr("pallas_kernels.decode_attention.cpu.OF_A_ROW", 24)
    case = DecodeCase((3, 40, 64, 17), heads=8, kv_heads=4, head_dim=32, page=8)
    (q, cache, *_), options = case.arguments()
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))

    def placed(a):
        spec = jax.P(None, None, "tensor") if a.ndim > 2 else jax.P()
        return jax.device_put(a, jax.NamedSharding(mesh, spec))

    def local(q, cache):
        return decode_attention(q, cache, **options, implementation="cpu")

    divided = jax.shard_map(local, mesh=mesh, out_specs=jax.P(None, None, "tensor"))
    found = jax.jit(divided)(*jax.tree.map(placed, (q, cache)))
    agree(case, [found, case.expected()[1]])
