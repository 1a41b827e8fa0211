"""A NaN anywhere in 8,192 numbers comes out, although the maximum in a softmax may pass it over."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import Mask, attention
from pallas_kernels.attention.chunked import blockwise
from pallas_kernels.attention.streaming import streaming
from pallas_kernels.cross_entropy import cross_entropy

SIZE = 8192
PLACES = st.integers(0, SIZE - 1)
ATTENTION = {
    "reference": functools.partial(attention, implementation="reference"),
    "blockwise": functools.partial(blockwise, rows=4),
    "streaming": functools.partial(streaming, query_block=4, key_block=SIZE),
    "streaming, blocks": functools.partial(streaming, query_block=2, key_block=4096),
}
CROSS_ENTROPY = {
    "reference": {"implementation": "reference"},
    "chunked, at once": {"implementation": "chunked"},
    "chunked": {"implementation": "chunked", "chunk": 2},
}


@functools.cache
def attended(name):
    """Output and gradients of queries that see all keys."""

    @jax.jit
    def run(q, k, v):
        apply = functools.partial(ATTENTION[name], mask=Mask(), bias=None, scale=0.5, softcap=None)

        def output_alone(q, k, v):
            result = apply(q, k, v)
            return result[0] if isinstance(result, tuple) else result

        output, pull = jax.vjp(output_alone, q, k, v)
        return (output, *pull(jnp.ones_like(output)))

    return run


@settings(max_examples=8)
@pytest.mark.parametrize("name", ATTENTION)
@given(place=PLACES, which=st.sampled_from("kv"))
def test_attention(name, place, which):
    draw = np.random.default_rng(place)
    arrays = {
        name: draw.normal(size=(1, size, 1, 2)).astype(np.float32)
        for name, size in (("q", 4), ("k", SIZE), ("v", SIZE))
    }
    output, *_ = attended(name)(**arrays)
    assert np.isfinite(np.asarray(output)).all()
    arrays[which][0, place, 0, 1] = np.nan
    output, d_q, _, _ = (np.asarray(array) for array in attended(name)(**arrays))
    assert np.isnan(output[..., 1]).all() and np.isnan(d_q).all()  # every query sees the key
    if which == "k":
        assert np.isnan(output).all()


@functools.cache
def scored(name):
    """Cross-entropy's terms and gradients."""

    @jax.jit
    def run(hidden, head):
        def total(hidden, head):
            terms = cross_entropy(
                hidden,
                head,
                jnp.zeros(hidden.shape[:2], jnp.int32),
                vocabulary=SIZE,
                largest=True,
                **CROSS_ENTROPY[name],
            )
            return jnp.sum(terms[0]) + 1e-3 * jnp.sum(jnp.square(terms[2])), terms[0]

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)

    return run


@settings(max_examples=8)
@pytest.mark.parametrize("name", CROSS_ENTROPY)
@given(place=PLACES)
def test_cross_entropy_of_a_broken_row_of_the_head(name, place):
    draw = np.random.default_rng(place)
    hidden = draw.normal(size=(1, 4, 2)).astype(np.float32)
    head = draw.normal(size=(SIZE, 2)).astype(np.float32)
    (total, each), _ = scored(name)(hidden, head)
    assert np.isfinite(np.asarray(each)).all() and np.isfinite(total)
    head[place, 1] = np.nan
    (total, each), (d_hidden, d_head) = scored(name)(hidden, head)
    assert np.isnan(total)
    for array in (each, d_hidden, d_head):
        assert np.isnan(np.asarray(array)).all()


@settings(max_examples=4)
@pytest.mark.parametrize("name", CROSS_ENTROPY)
@given(token=st.integers(0, 3))
def test_cross_entropy_of_a_broken_token_is_its_own(name, token):
    draw = np.random.default_rng(token)
    hidden = draw.normal(size=(1, 4, 2)).astype(np.float32)
    hidden[0, token, 0] = np.nan
    head = draw.normal(size=(SIZE, 2)).astype(np.float32)
    (total, each), _ = scored(name)(hidden, head)
    assert np.isnan(total)
    np.testing.assert_array_equal(np.isnan(np.asarray(each)[0]), np.arange(4) == token)
