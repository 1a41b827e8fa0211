"""Grouped product: all implementations against numpy float64, on meshes, for described chips."""

from __future__ import annotations

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import topologies
from pallas_kernels.grouped_product import grouped_product, implementations
from pallas_kernels.target import interpreted

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def draw(tokens, width, out, groups):
    random = np.random.default_rng(tokens + groups)
    shapes = (tokens, width), (groups, width, out), (tokens, out)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def expected(x, w, sizes, d_y):
    """Product and gradients in float64, group by group."""
    x, w, d_y = (array.astype(np.float64) for array in (x, w, d_y))
    y, d_x, d_w = np.zeros(d_y.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], d_x[rows] = x[rows] @ w[group], d_y[rows] @ w[group].T
        d_w[group] = x[rows].T @ d_y[rows]
        start += size
    return y, d_x, d_w


def product_and_gradients(name, x, w, sizes, d_y):
    def apply(x, w):
        return grouped_product(x, w, sizes, implementation=name)

    y, pull = jax.vjp(apply, x, w)
    return y, *pull(d_y)


def run(name, x, w, sizes, d_y, kind="TPU v5 lite", interpret=True):
    with interpreted(kind, interpret) if name == "tpu" else contextlib.nullcontext():
        function = jax.jit(functools.partial(product_and_gradients, name))
        return function(x, w, np.asarray(sizes, np.int32), d_y)


def check(found, *given):
    for one, other in zip(found, expected(*given), strict=True):
        # float32 sums of up to 700 terms of size 1.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


@settings(max_examples=4)
@pytest.mark.parametrize("name", implementations())
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 5, 128, 130, 200]), min_size=1, max_size=5),
    left=st.sampled_from([0, 1, 300]),
    width=st.sampled_from([3, 16]),
    out=st.sampled_from([5, 130]),
)
def test_any_sizes(name, sizes, left, width, out):
    tokens = max(1, sum(sizes) + left)
    x, w, d_y = draw(tokens, width, out, len(sizes))
    check(run(name, x, w, sizes, d_y), x, w, sizes, d_y)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])  # of 128 and of 256 rows
def test_memory_that_is_read_was_written_before(kind):
    """Under an interpreter with NaN for memory that was never written, and a detector of races."""
    sizes = [100, 0, 300, 1, 129]
    x, w, d_y = draw(700, 16, 24, 5)
    check(run("tpu", x, w, sizes, d_y, kind, RACES), x, w, sizes, d_y)


@pytest.mark.parametrize("name", implementations())
def test_bfloat16_is_accumulated_in_float32(name):
    sizes = [300, 212]
    given = [np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in draw(512, 64, 32, 2)]
    found = run(name, *given[:2], sizes, given[2])
    for one, other in zip(found, expected(*given[:2], sizes, given[2])):
        assert one.dtype == jnp.bfloat16
        # Only the result is rounded, to 8 bits.
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=2**-8, atol=1e-3 * np.abs(other).max()
        )


@pytest.mark.parametrize("name", ["blocks", "tpu"])
def test_rows_of_other_groups_do_not_matter(name):
    """NaN of one group stays its own, and rows of no group are never looked at."""
    sizes = [100, 50, 70]
    x, w, d_y = draw(256, 16, 8, 3)
    x[100:150] = np.nan
    x[220:] = np.nan
    y, d_x, d_w = map(np.asarray, run(name, x, w, sizes, d_y))
    assert np.isnan(y[100:150]).all() and np.isfinite(np.delete(y, np.s_[100:150], 0)).all()
    assert np.isfinite(d_x).all()
    assert np.isnan(d_w[1]).all() and np.isfinite(d_w[[0, 2]]).all()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize("name", ["blocks", "ragged", "tpu"])
def test_on_a_mesh(name):
    """Replicated arrays outside, and each device's own inside a `jax.shard_map`."""
    sizes = [40, 0, 30, 20]
    given = x, w, d_y = draw(100, 8, 16, 4)
    arrays = x, w, np.asarray(sizes, np.int32), d_y
    function = functools.partial(product_and_gradients, name)
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    with interpreted("TPU v5 lite"), jax.set_mesh(mesh):
        check(jax.jit(function)(*(jax.reshard(a, P()) for a in arrays)), x, w, sizes, d_y)

        # Every device: all rows by its own columns of the matrices.
        def columns(x, w, sizes, d_y):
            y, d_x, d_w = function(x, w, sizes, d_y)
            return y, jax.lax.psum(d_x, "expert"), d_w

        own, whole = P(None, None, "expert"), P(None, "expert")
        divided = jax.shard_map(
            columns,
            in_specs=(P(), own, P(), whole),
            out_specs=(whole, P(), own),
            check_vma=False,
        )
        specs = P(), own, P(), whole
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]
        check(jax.jit(divided)(*placed), given[0], w, sizes, d_y)


def test_the_blocks_cost_no_more_than_the_rows():
    """Products of the loop's body are of one block, whatever the number of groups."""
    x, w, _ = draw(1024, 16, 16, 32)
    jaxpr = str(jax.make_jaxpr(grouped_product)(x, w, np.full(32, 32, np.int32)))
    assert "f32[16,16]" in jaxpr and "pallas_call" not in jaxpr
    assert jaxpr.count("dot_general") == 1 and jaxpr.count("while") == 1


def test_mistakes_are_refused():
    x, w, _ = map(jnp.asarray, draw(8, 4, 4, 2))
    sizes = jnp.asarray([3, 4])
    with pytest.raises(ValueError, match="'fast' is not one of reference, ragged, blocks, tpu"):
        grouped_product(x, w, sizes, implementation="fast")
    with pytest.raises(ValueError, match="'tpu' cannot serve this call: it needs a TPU"):
        grouped_product(x, w, sizes, implementation="tpu")
    plain = inspect.unwrap(grouped_product)  # without the tests' own check of shapes and dtypes
    with pytest.raises(ValueError, match="do not fit"):
        plain(x, w, sizes[:1])
    with pytest.raises(ValueError, match="x of float32 and w of bfloat16"):
        plain(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="they are integers"):
        plain(x, w, sizes.astype(jnp.float32))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
def test_arrays_that_are_divided_are_refused():
    x, w, _ = draw(8, 4, 4, 2)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        x = jax.reshard(x, P("data", None))
        with pytest.raises(ValueError, match=r"x is divided over .*inside a jax\.shard_map"):
            jax.jit(grouped_product)(x, w, np.asarray([3, 4], np.int32))


@pytest.mark.skipif(not topologies.has_tpu_compiler(), reason="needs libtpu: lmjax[tpu]")
@pytest.mark.parametrize("chip", topologies.TPUS)
def test_compiles_for_a_described_chip(chip):
    mesh = Mesh(np.array(topologies.tpu(chip)[:1]), ("expert",), axis_types=(AxisType.Explicit,))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    half = functools.partial(array, jnp.bfloat16)
    with jax.set_mesh(mesh):
        function = jax.jit(functools.partial(product_and_gradients, None))
        compiled = function.lower(
            half(300, 256), half(4, 256, 384), array(jnp.int32, 4), half(300, 384)
        ).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
