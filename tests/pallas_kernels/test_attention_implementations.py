"""Every implementation of attention against the same formulas in numpy float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sizes
from pallas_kernels.attention import Dropout, LinearBias, Mask, attention, implementations, table
from pallas_kernels.attention.chunked import blockwise
from pallas_kernels.attention.dropout import factors
from pallas_kernels.attention.streaming import streaming
from pallas_kernels.target import interpreted
from tests.pallas_kernels.conftest import CASES


def on_tpu(*arrays, **settings):
    """The kernels for TPUs in an interpreter."""
    sizes = {"span": 32, "key": 16, "query": 16, "chunk_keys": 8, "chunk_queries": 16, "part": 8}
    back = {"span": 32, "key": 16, "query": 16, "strip": 16, "edge_strip": 8, "part": 8}
    with (
        interpreted("TPU v5 lite"),
        block_sizes.using("attention_forward", **sizes),
        block_sizes.using("attention_backward", **back, transposed=0, memory=16),
    ):
        return attention(*arrays, **settings, implementation="tpu")


# The blocks are so small that the cases have empty, partial and full tiles and a rest.
IMPLEMENTATIONS = {
    "reference": functools.partial(attention, implementation="reference"),
    "blockwise": functools.partial(attention, implementation="blockwise"),
    "streaming": functools.partial(attention, implementation="streaming"),
    "tpu": on_tpu,
}
TOLERANCE = 3e-6  # sums of some 40 float32 numbers of size 1


def _with_lse(function, **static):
    """One of the forms of `chunked` as an implementation."""

    def serve(q, k, v, mask, bias, *, scale, softcap, dropout, return_lse=False):
        result = function(q, k, v, mask, bias, dropout, scale=scale, softcap=softcap, **static)
        return result if return_lse else result[0]

    return serve


def with_others(first, without=()):
    """A table of some implementations before those that are there, less some."""
    made = table.ImplementationTable("attention")
    there = table._table._entries.values()
    for entry in (*first, *(entry for entry in there if entry.name not in without)):
        made.register(entry)
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The two forms of `chunked` in the table, with blocks that are small enough."""
    forms = {
        "streaming": _with_lse(streaming, query_block=8, key_block=4),
        "blockwise": _with_lse(blockwise, rows=16),
        "recomputing": _with_lse(blockwise, rows=16, recompute=True),
    }
    added = [
        table.Implementation(name, serve, lambda request: None, returns_lse=True)
        for name, serve in forms.items()
    ]
    monkeypatch.setattr(table, "_table", with_others(added))


def value_and_gradients(function, case, dtype=jnp.float32):
    """Output, log-sum-exp and gradients by name, one compiled program."""
    arrays = {
        name: None if array is None else jnp.asarray(array, dtype)
        for name, array in case.arrays().items()
    }
    arrays["d_lse"] = arrays["d_lse"].astype(jnp.float32)

    @jax.jit
    def run(q, k, v, bias, sinks, d_output, d_lse, mask):
        def apply(q, k, v, bias, sinks):
            return function(
                q,
                k,
                v,
                mask,
                **case.given({"bias": bias, "sinks": sinks}),
                scale=case.scale,
                softcap=case.softcap,
                return_lse=True,
            )

        (output, lse), pull = jax.vjp(apply, q, k, v, bias, sinks)
        d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0.0)
        return (output, lse, *pull((output * 0 + d_output, d_lse)))

    names = ("output", "lse", "q", "k", "v", "bias", "sinks")
    results = dict(zip(names, run(**arrays, mask=case.jax_mask())))
    return {name: np.asarray(array) for name, array in results.items() if array is not None}


# By the interpreter, which takes long, these are among the slow tests: others have their parts.
PARTS = {"full", "causal", "window", "causal_window", "linear", "grouped_bias", "offset"}
PARTS |= {"permutation", "permutation_window", "ranks_of_others"}


@pytest.mark.parametrize(
    ("name", "case_name"),
    [
        pytest.param(
            *(name, case.name),
            marks=[pytest.mark.slow] * (name == "tpu" and case.name in PARTS),
        )
        for name in IMPLEMENTATIONS
        for case in CASES
    ],
)
def test_output_and_gradients(name, case_name, named_case):
    case = named_case(case_name)
    results = value_and_gradients(IMPLEMENTATIONS[name], case)
    expected = case.expected()
    assert results.keys() == expected.keys()
    seen = np.isfinite(expected["lse"])
    np.testing.assert_array_equal(np.isfinite(results["lse"]), seen)
    for what, array in results.items():
        if what == "lse":
            array, expected["lse"] = array[seen], expected["lse"][seen]
        scale = max(1.0, np.abs(expected[what]).max())
        np.testing.assert_allclose(
            array / scale, expected[what] / scale, atol=TOLERANCE, err_msg=what
        )
    check_what_is_not_seen_has_exactly_no_influence(results, case.visible_array())


def check_what_is_not_seen_has_exactly_no_influence(results, visible):
    """Blind queries give zeros; they, and keys that nothing sees, get gradients of zero."""
    blind, unseen = ~visible.any(axis=2), ~visible.any(axis=1)
    assert not results["output"][blind].any()
    assert not results["q"][blind].any()
    assert not results["k"][unseen].any()
    assert not results["v"][unseen].any()
    if results.get("bias", np.zeros(0)).shape[2:] == visible.shape[1:]:
        assert not results["bias"][:, :, ~visible.any(axis=0)].any()


def test_some_cases_have_blind_queries_and_unseen_keys(named_case):
    for name in ("segments", "rows_after_the_keys"):
        visible = named_case(name).visible_array()
        assert not visible.any(axis=2).all()
        assert not visible.any(axis=1).all()


@pytest.mark.parametrize("case_name", ["causal_window", "grouped_bias"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16(name, case_name, named_case):
    case = named_case(case_name)
    results = value_and_gradients(IMPLEMENTATIONS[name], case, jnp.bfloat16)
    for what, expected in case.expected().items():
        assert results[what].dtype == (jnp.float32 if what == "lse" else jnp.bfloat16)
        # 8 bits of mantissa: 2**-8 of the largest for each of the few roundings on the way.
        error = np.abs(results[what].astype(np.float64) - expected).max()
        assert error < 4 * 2**-8 * np.abs(expected).max(), what


def test_ranks_rule_tiles_out():
    """Tiles of keys of too high a rank are not even read: their values are no numbers."""
    ranks = jnp.array([[0] * 12 + [*range(12, 20)]] * 2)
    mask = Mask(causal=True, query_ranks=ranks, key_ranks=ranks)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 20, 2, 8))
    expected = attention(q, k, v, mask, implementation="reference", scale=0.4)[:, :12]
    v = v.at[:, 12:].set(jnp.nan)
    output = streaming(q, k, v, mask, scale=0.4, query_block=6, key_block=4)[0][:, :12]
    np.testing.assert_allclose(output, expected, atol=TOLERANCE)


def test_recomputing_blocks_changes_nothing(named_case):
    case = named_case("segments")
    kept, again = (
        value_and_gradients(functools.partial(attention, implementation=name), case)
        for name in ("blockwise", "recomputing")
    )
    for what, array in kept.items():
        np.testing.assert_allclose(again[what], array, atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_vmap_equals_a_loop(name, named_case):
    case = named_case("segments")
    mask = case.jax_mask()
    several = [case.arrays(seed) for seed in range(2)]
    function = functools.partial(IMPLEMENTATIONS[name], scale=case.scale)

    def apply(q, k, v, bias):
        return function(q, k, v, mask, bias)

    names = ("q", "k", "v", "bias")
    stacked = [jnp.stack([arrays[name] for arrays in several]) for name in names]
    together = jax.jit(jax.vmap(apply))(*stacked)
    one = jax.jit(apply)
    for output, arrays in zip(together, several):
        # Batched products may add in another order.
        np.testing.assert_allclose(output, one(*(arrays[n] for n in names)), atol=1e-6)


@pytest.mark.parametrize("case_name", ["segments", "everything"])
def test_numpy_gradients_are_those_of_the_loss(case_name, named_case):
    """Finite differences of the yardstick itself, in float64."""
    case = named_case(case_name)
    arrays = case.arrays()
    expected = case.expected(arrays)
    seen = np.isfinite(expected["lse"])
    random = np.random.default_rng(1)

    def loss(changed):
        found = case.expected({**arrays, **changed})
        output = np.vdot(found["output"], arrays["d_output"])
        return output + np.vdot(found["lse"][seen], arrays["d_lse"][seen])

    for what in ("q", "k", "v", *("bias", "sinks")[: 1 + case.sinks]):
        step = 1e-3 * random.normal(size=arrays[what].shape)
        there, back = (loss({what: arrays[what] + sign * step}) for sign in (1, -1))
        np.testing.assert_allclose((there - back) / 2, np.vdot(expected[what], step), rtol=1e-4)


def test_dropout_keeps_the_mean_and_drops_the_rate():
    q = k = jnp.zeros((1, 4, 1, 8))
    v = jnp.broadcast_to(jnp.eye(4)[None, :, None], (1, 4, 1, 4))  # the output is the weights
    keys = jax.random.split(jax.random.key(0), 200)

    @jax.jit
    @jax.vmap
    def weights(key):
        dropout = Dropout(jax.random.bits(key, (1, 1, 4)), 0.25)
        return attention(q, k, v, Mask(), dropout=dropout)

    weights = np.asarray(weights(keys))
    # 3200 draws: the standard deviation of the rate is 0.008.
    assert abs((weights == 0).mean() - 0.25) < 0.03
    assert abs(weights.mean() - 0.25) < 0.01
    np.testing.assert_allclose(weights[weights > 0], 0.25 / 0.75, rtol=1e-6)


def test_dropout_is_independent_of_rows_and_keys():
    """Neighbours in either direction, and rows of seeds that differ by a bit, are uncorrelated."""
    seeds = jnp.concatenate([jax.random.bits(jax.random.key(1), (500,), jnp.uint32)] * 2)
    seeds = seeds.at[500:].set(seeds[:500] ^ 1)
    dropped = np.asarray(factors(seeds, jnp.arange(1000), 0.5)) == 0
    pairs = [(dropped[:, 1:], dropped[:, :-1]), (dropped[1:500], dropped[:499])]
    for one, other in [*pairs, (dropped[:500], dropped[500:])]:
        # Of 500,000 pairs the standard deviation is 0.0014.
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.006
    # The rates of 1000 rows: 1000 draws each, a standard deviation of 0.0158, of keys the same.
    for axis in (0, 1):
        assert abs(dropped.mean(axis=axis).std() - 0.0158) < 0.002


def test_none_is_one_of_the_named():
    q = k = v = jnp.ones((1, 8, 2, 8))
    for implementation in (None, "chunked"):
        output = attention(q, k, v, Mask(causal=True), implementation=implementation)
        np.testing.assert_allclose(output, 1.0, rtol=1e-6)
    assert implementations()[-5:] == ("reference", "chunked", "cudnn", "hopper", "tpu")


WELL_FORMED = {
    "q": jnp.ones((1, 8, 4, 8)),
    "k": jnp.ones((1, 8, 2, 8)),
    "v": jnp.ones((1, 8, 2, 8)),
    "mask": Mask(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "'fast' is not one of .*reference, chunked, cudnn"),
        ({"k": jnp.ones((1, 8, 3, 8)), "v": jnp.ones((1, 8, 3, 8))}, "4 query heads"),
        (
            {"dropout": Dropout(jnp.ones((1, 2, 8), jnp.uint32), 0.1)},
            r"seeds \(1, 2, 8\) of dropout for rows of weights \(1, 4, 8\)",
        ),
        ({"bias": LinearBias(jnp.ones(3))}, "a bias of 3 heads for 4 query heads"),
        ({"implementation": "cudnn"}, "'cudnn' cannot serve this call: it needs an NVIDIA GPU"),
    ],
)
def test_refusals_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**WELL_FORMED, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"v": jnp.ones((1, 7, 2, 8))},
        {"bias": jnp.ones((1, 3, 8, 8))},
        {"sinks": jnp.ones(2)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(change):
    # TypeError is the shape check of the tests, which notices first.
    with pytest.raises((ValueError, TypeError)):
        attention(**{**WELL_FORMED, **change})


def test_an_implementation_of_ones_own_joins_the_table(monkeypatch):
    """It is preferred where it can serve; where none can, the error has all reasons."""
    monkeypatch.setattr(table, "_table", with_others([]))
    short = table.Implementation(
        "short",
        lambda q, **rest: jnp.full_like(q, 7.0),
        lambda request: "more than 4 queries" if request.q.shape[1] > 4 else None,
    )
    table.register(short)
    with pytest.raises(ValueError, match="'short' already"):
        table.register(short)
    assert implementations()[-1] == "short"
    few = {**WELL_FORMED, "q": WELL_FORMED["q"][:, :4]}
    assert (attention(**few) == 7.0).all() and (attention(**WELL_FORMED) == 1.0).all()
    with pytest.raises(ValueError, match="'short' cannot serve this call: more than 4 queries"):
        attention(**WELL_FORMED, implementation="short")
    monkeypatch.setattr(table, "_table", with_others([], without=implementations()[:-1]))
    with pytest.raises(ValueError, match=r"no implementation can .*\n  short: more than 4 queries"):
        attention(**WELL_FORMED)
