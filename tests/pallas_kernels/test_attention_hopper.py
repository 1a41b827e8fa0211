"""Attention's kernels for Hopper: numerics by Pallas' GPU interpreter, and compiled for an H100."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from pallas_kernels.attention import LinearBias, Mask, Tile, attention, hopper, tiles, visited
from pallas_kernels.attention.bias import DistanceBias
from pallas_kernels.attention.hopper import forward
from pallas_kernels.attention.hopper.lists import by_keys, by_queries
from pallas_kernels.attention.hopper.plan import TileSizes
from pallas_kernels.attention.table import Request, choose
from pallas_kernels.target import Target, interpreted
from tests.pallas_kernels.gpu_interpreter import hopper_interpreted, races_found

H100 = "NVIDIA H100 80GB HBM3"
TOLERANCE = 3e-6  # sums of some 40 float32 numbers of size 1
# So small that the cases have empty, partial and full tiles, and a rest.
SMALL = TileSizes(rows=4, forward_keys=8, query_gradient_keys=8, key_gradient_queries=8)


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles of a few rows, and heads that are not padded to 64."""
    monkeypatch.setattr(hopper, "default_blocks", lambda *sizes: SMALL)
    monkeypatch.setattr(hopper, "ALIGNED", 4)


def results(case, gradients: bool) -> dict[str, np.ndarray]:
    """Output, log-sum-exp and, where asked for, gradients, by name."""
    arrays = {
        name: None if array is None else jnp.asarray(array) for name, array in case.arrays().items()
    }

    @jax.jit
    def run(q, k, v, bias, sinks, d_output, d_lse, mask):
        def apply(q, k, v, bias, sinks):
            given = case.given({"bias": bias, "sinks": sinks})
            options = {"scale": case.scale, "softcap": case.softcap, "return_lse": True}
            return attention(q, k, v, mask, **given, **options, implementation="hopper")

        if not gradients:
            return apply(q, k, v, bias, sinks)
        (output, lse), pull = jax.vjp(apply, q, k, v, bias, sinks)
        d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0.0)
        return (output, lse, *pull((output * 0 + d_output, d_lse)))

    names = ("output", "lse", "q", "k", "v", "bias", "sinks")
    found = zip(names, run(**arrays, mask=case.jax_mask()))
    return {name: np.asarray(array) for name, array in found if array is not None}


def check(case, found) -> None:
    """Compares with numpy in float64; what is not seen has no influence at all."""
    expected, visible = case.expected(), case.visible_array()
    seen = np.isfinite(expected["lse"])
    np.testing.assert_array_equal(np.isfinite(found["lse"]), seen)
    for what, array in found.items():
        wanted = expected[what]
        if what == "lse":
            array, wanted = array[seen], wanted[seen]
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(array / scale, wanted / scale, atol=TOLERANCE, err_msg=what)
    blind, unseen = ~visible.any(axis=2), ~visible.any(axis=1)
    assert not found["output"][blind].any()
    for what, rows in (("q", blind), ("k", unseen), ("v", unseen)):
        assert what not in found or not found[what][rows].any()


def test_one_query_forward(small_blocks, monkeypatch, named_case):
    case = named_case("one_query")
    with hopper_interpreted(monkeypatch):
        check(case, results(case, gradients=False))


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_races(planted, small_blocks, monkeypatch, named_case):
    """There are none, and one is found where both warpgroups write to the same memory."""
    case, write = named_case("one_query"), forward._write
    if planted:
        same = lambda plan, refs, where, wg, *row: write(plan, refs, where, 0, *row)  # noqa: E731
        monkeypatch.setattr(forward, "_write", same)
    with hopper_interpreted(monkeypatch, detect_races=True):
        assert races_found(lambda: results(case, gradients=not planted)) == planted


# The other cases are parts of these: a softcap, sinks, dropout, a prefix, and masks alone.
WHOLE = (
    *("causal", "window", "segments", "segments_ranks"),
    *("grouped_bias", "offset", "traced_offset_window", "rows_after_the_keys", "one_query"),
    *("linear", "causal_buckets", "everything"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_output_and_gradients(small_blocks, monkeypatch, named_case, name):
    case = named_case(name)
    with hopper_interpreted(monkeypatch):
        check(case, results(case, gradients=True))


@pytest.mark.slow
def test_columns_of_wide_heads_are_halved(small_blocks, monkeypatch, named_case):
    """As where heads are wider than 128: each warpgroup has half of the columns of gradients."""
    from pallas_kernels.attention.hopper import gradient

    monkeypatch.setattr(gradient, "columns", lambda *sizes: 2)
    monkeypatch.setattr(gradient, "HALF", 4)
    case = named_case("grouped_bias")
    with hopper_interpreted(monkeypatch):
        check(case, results(case, gradients=True))


@pytest.mark.slow
def test_vmap_equals_a_loop(small_blocks, monkeypatch, named_case):
    case = named_case("one_query")
    several = [case.arrays(seed) for seed in range(2)]
    mask = case.jax_mask()

    def apply(q, k, v):
        return attention(q, k, v, mask, implementation="hopper")

    stacked = [jnp.stack([arrays[name] for arrays in several]) for name in ("q", "k", "v")]
    with hopper_interpreted(monkeypatch):
        together = jax.jit(jax.vmap(apply))(*stacked)
        for output, *inputs in zip(together, *stacked):
            np.testing.assert_allclose(output, jax.jit(apply)(*inputs), atol=1e-6)


@pytest.mark.slow
def test_bfloat16(small_blocks, monkeypatch, named_case):
    case = named_case("softcap")
    q, k, v = (jnp.asarray(case.arrays()[name], jnp.bfloat16) for name in ("q", "k", "v"))
    mask, options = case.jax_mask(), {"scale": case.scale}
    exact = attention(*(a.astype(jnp.float32) for a in (q, k, v)), mask, **options)
    with hopper_interpreted(monkeypatch):
        run = jax.jit(lambda q, k, v: attention(q, k, v, mask, **options, implementation="hopper"))
        output = run(q, k, v)
    assert output.dtype == jnp.bfloat16
    # 8 bits of mantissa: 2**-8 of the largest for each of the few roundings on the way.
    error = np.abs(np.asarray(output, np.float64) - np.asarray(exact)).max()
    assert error < 4 * 2**-8 * np.abs(exact).max()


LENGTH = 41  # one for all examples, whose operations are compiled once


@settings(max_examples=20)
@given(
    starts=st.sets(st.integers(1, LENGTH - 1), max_size=5),
    window=st.none() | st.just(9),
    causal=st.booleans(),
    traced=st.booleans(),
)
def test_lists_have_every_tile_that_is_not_empty_once(starts, window, causal, traced):
    segments = np.ones((1, LENGTH), np.int32)
    for start in starts:
        segments[:, start:] += 1
    mask = Mask(causal=causal, window=window, query_segments=segments, key_segments=segments)
    sizes = (LENGTH, LENGTH, 8, 4)
    classes = np.asarray(tiles(mask, *sizes))
    if traced:
        mask = jax.tree.map(jnp.asarray, mask)
    for lists, grid in (
        (by_queries(mask, *sizes), classes),
        (by_keys(mask, *sizes), classes.swapaxes(1, 2)),
    ):
        assert np.sum(lists.counts[..., 1]) == visited(mask, *sizes)
        for b, block in np.ndindex(*grid.shape[:2]):
            full, total = lists.counts[b, block]
            listed = grid[b, block][np.asarray(lists.order[b, block])]
            assert (listed[:full] == Tile.FULL).all()
            assert (listed[full:total] == Tile.PARTIAL).all()
            assert (listed[total:] == Tile.EMPTY).all()
        longest = np.take_along_axis(np.asarray(lists.counts[..., 1]), lists.longest, axis=1)
        assert (np.diff(longest, axis=1) <= 0).all()


def half(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.bfloat16)


SERVED = {"q": half(1, 8, 4, 64), "k": half(1, 8, 2, 64), "v": half(1, 8, 2, 64), "mask": Mask()}


class _Squares(DistanceBias):
    num_heads = 4

    def at(self, distance):
        return jnp.broadcast_to(distance.astype(jnp.float32) ** 2, (4, *distance.shape))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("TPU v4", {}, "it needs a Hopper GPU and the device is a tpu"),
        ("NVIDIA A100-SXM4-80GB", {}, "not NVIDIA A100"),
        ("NVIDIA B200", {}, "not NVIDIA B200"),
        (H100, {"q": jnp.ones((1, 8, 4, 64))}, "bfloat16 or float16, the same for all"),
        (H100, {"v": half(1, 8, 2, 320)}, "value_dim 320, it takes sizes up to 256"),
        (H100, {"scale": 0.0}, "a scale of 0.0"),
        (H100, {"bias": _Squares()}, "_Squares, it takes LinearBias, BucketBias and arrays"),
    ],
)
def test_refusals_say_why(kind, change, message, monkeypatch):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    monkeypatch.setattr(hopper, "target", lambda: Target(platform, kind))
    with pytest.raises(ValueError, match=message):
        attention(**{**SERVED, **change}, implementation="hopper")


@pytest.mark.parametrize("kind", [H100, "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20", "H100"])
def test_it_is_preferred_on_hopper(kind, monkeypatch):
    monkeypatch.setattr(hopper, "target", lambda: Target("gpu", kind))
    for change in ({}, {"bias": LinearBias(jnp.ones(4))}, {"softcap": 3.0}):
        call = {"bias": None, "scale": 1.0, "softcap": None, "dropout": None} | SERVED | change
        assert choose(Request(**call), None).name == "hopper"


def kernels(jaxpr) -> int:
    """Kernels in a jaxpr and in those within."""
    count = 0
    for equation in jaxpr.eqns:
        if "grid_names" in str(equation.params.get("mesh", "")) or equation.primitive.name in (
            "pallas_call",
            "core_map",
            "mpmd_map",
        ):
            count += 1
            continue
        count += sum(map(kernels, jaxprs_in_params(equation.params)))
    return count


def test_a_policy_keeps_what_the_backward_pass_needs():
    """The kernels that run: forward and two backward, and forward again where nothing is kept."""
    keep = jax.checkpoint_policies.save_only_these_names("attention")
    nothing = jax.checkpoint_policies.nothing_saveable

    def count(policy) -> int:
        def loss(q, k, v):
            return attention(q, k, v, Mask(causal=True)).astype(jnp.float32).sum()

        gradient = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
        arrays = [SERVED[name] for name in ("q", "k", "v")]
        return kernels(jax.make_jaxpr(gradient)(*arrays).jaxpr)

    with interpreted(H100, False):
        assert count(keep) == 3
        assert count(nothing) == 4


def test_shard_map_types():
    """Outputs and gradients vary over the axes of the mesh that inputs do."""
    mesh = jax.make_mesh((2,), ("data",))
    rows = jax.P("data")

    def gradients(q, k, v):
        output, pull = jax.vjp(functools.partial(attention, mask=Mask(causal=True)), q, k, v)
        return pull(output)

    with interpreted(H100, False), jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, rows)
        arrays = [
            jax.ShapeDtypeStruct((2, *SERVED[name].shape[1:]), jnp.bfloat16, sharding=sharding)
            for name in ("q", "k", "v")
        ]
        mapped = jax.shard_map(gradients, in_specs=rows, out_specs=rows)
        shapes = jax.eval_shape(mapped, *arrays)
    assert [shape.shape for shape in shapes] == [array.shape for array in arrays]


COMPILED = ("causal 64", "packed, 4 heads to 1", "dropout 256")


@pytest.fixture(scope="module")
def report():
    """The report of compiled kernels, where an H100 can be described."""
    from benchmarks import hopper_kernels
    from pallas_kernels.topologies import hopper as described

    try:
        described()
    except Exception as error:
        pytest.skip(f"no compiler for NVIDIA GPUs: {error}")
    return hopper_kernels


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_for_an_h100(name, report):
    """No register is spilled, and no product is made twice."""
    for kernel in report.report(report.VARIANTS[name]):
        assert kernel["products"] == kernel["least"], kernel
        assert kernel["shared_memory"] <= 232448, kernel
        assert kernel["spilled"] == 0, kernel
