"""Every implementation of attention against the same formulas in numpy float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention, implementations, table
from pallas_kernels.attention.chunked import blockwise
from pallas_kernels.attention.streaming import streaming

# The blocks are so small that the cases have empty, partial and full tiles and a rest.
IMPLEMENTATIONS = {
    "reference": functools.partial(attention, implementation="reference"),
    "blockwise": functools.partial(blockwise, rows=16),
    "streaming": functools.partial(streaming, query_block=8, key_block=4),
}
TOLERANCE = 3e-6  # sums of some 40 float32 numbers of size 1


def value_and_gradients(function, case, dtype=jnp.float32):
    """Output and gradients by name, one compiled program."""
    arrays = {
        name: None if array is None else jnp.asarray(array, dtype)
        for name, array in case.arrays().items()
    }

    @jax.jit
    def run(q, k, v, bias, d_output, mask):
        def apply(q, k, v, bias):
            return function(q, k, v, mask, bias, scale=case.scale, softcap=case.softcap)

        output, pull = jax.vjp(apply, q, k, v, bias)
        return (output, *pull(d_output))

    results = dict(zip(("output", "q", "k", "v", "bias"), run(**arrays, mask=case.jax_mask())))
    return {name: np.asarray(array) for name, array in results.items() if array is not None}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_gradients(name, case):
    results = value_and_gradients(IMPLEMENTATIONS[name], case)
    expected = case.expected()
    assert results.keys() == expected.keys()
    for what, array in results.items():
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
    if "bias" in results and results["bias"].shape[2:] == visible.shape[1:]:
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
        assert results[what].dtype == jnp.bfloat16
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
    output = streaming(q, k, v, mask, scale=0.4, query_block=6, key_block=4)[:, :12]
    np.testing.assert_allclose(output, expected, atol=TOLERANCE)


def test_recomputing_blocks_changes_nothing(named_case):
    case = named_case("segments")
    kept, again = (
        value_and_gradients(functools.partial(blockwise, rows=16, recompute=flag), case)
        for flag in (False, True)
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


def test_numpy_gradients_are_those_of_the_loss(named_case):
    """Finite differences of the yardstick itself, in float64."""
    case = named_case("segments")
    arrays = case.arrays()
    expected = case.expected(arrays)
    random = np.random.default_rng(1)
    for what in ("q", "k", "v", "bias"):
        step = 1e-3 * random.normal(size=arrays[what].shape)
        there, back = (
            np.vdot(
                case.expected({**arrays, what: arrays[what] + sign * step})["output"],
                arrays["d_output"],
            )
            for sign in (1, -1)
        )
        np.testing.assert_allclose((there - back) / 2, np.vdot(expected[what], step), rtol=1e-4)


def test_dropout_keeps_the_mean_and_drops_the_rate():
    q = k = jnp.zeros((1, 4, 1, 8))
    v = jnp.broadcast_to(jnp.eye(4)[None, :, None], (1, 4, 1, 4))  # the output is the weights
    keys = jax.random.split(jax.random.key(0), 200)
    weights = jax.jit(jax.vmap(lambda key: attention(q, k, v, Mask(), dropout=(0.25, key))))(keys)
    weights = np.asarray(weights)
    # 3200 draws: the standard deviation of the rate is 0.008.
    assert abs((weights == 0).mean() - 0.25) < 0.03
    assert abs(weights.mean() - 0.25) < 0.01
    np.testing.assert_allclose(weights[weights > 0], 0.25 / 0.75, rtol=1e-6)


def test_none_is_one_of_the_named():
    q = k = v = jnp.ones((1, 8, 2, 8))
    for implementation in (None, "chunked"):
        output = attention(q, k, v, Mask(causal=True), implementation=implementation)
        np.testing.assert_allclose(output, 1.0, rtol=1e-6)
    assert implementations() == ("reference", "chunked", "cudnn")


WELL_FORMED = {
    "q": jnp.ones((1, 8, 4, 8)),
    "k": jnp.ones((1, 8, 2, 8)),
    "v": jnp.ones((1, 8, 2, 8)),
    "mask": Mask(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "'fast' is not one of reference, chunked, cudnn"),
        ({"k": jnp.ones((1, 8, 3, 8)), "v": jnp.ones((1, 8, 3, 8))}, "4 query heads"),
        (
            {"dropout": (0.1, jax.random.key(0)), "implementation": "chunked"},
            "'chunked' cannot serve this call: dropout of attention weights",
        ),
    ],
)
def test_refusals_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**WELL_FORMED, **change})


@pytest.mark.parametrize(
    "change", [{"v": jnp.ones((1, 7, 2, 8))}, {"bias": jnp.ones((1, 3, 8, 8))}]
)
def test_shapes_that_do_not_fit_are_refused(change):
    # TypeError is the shape check of the tests, which notices first.
    with pytest.raises((ValueError, TypeError)):
        attention(**{**WELL_FORMED, **change})


def test_an_implementation_of_ones_own_joins_the_table(monkeypatch):
    """It is preferred where it can serve; where none can, the error has all reasons."""
    monkeypatch.setattr(table, "_table", dict(table._table))
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
    for name in ("reference", "chunked", "cudnn"):
        monkeypatch.delitem(table._table, name)
    with pytest.raises(ValueError, match=r"no implementation can .*\n  short: more than 4 queries"):
        attention(**WELL_FORMED)
