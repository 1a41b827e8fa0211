"""Attention in parts of the keys, put together by their log-sum-exp, as rings of devices do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention, merge

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, SIZE = 2, 5, 12, 4, 2, 8
EDGES = (0, 3, 4, 9, KEYS)


@pytest.fixture(scope="module")
def arrays():
    draw = np.random.default_rng(0).normal
    shapes = ((QUERIES, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS), (QUERIES, HEADS))
    return [jnp.asarray(draw(size=(BATCH, *shape, SIZE)), jnp.float32) for shape in shapes]


def whole(q, k, v, mask):
    return attention(q, k, v, mask)


def in_parts(q, k, v, mask):
    """Each part of the keys has its own mask: the distance to its first key is less."""
    parts = []
    for first, end in itertools.pairwise(EDGES):
        own = Mask(causal=mask.causal, window=mask.window, offset=mask.offset - first)
        keys, values = k[:, first:end], v[:, first:end]
        parts.append(attention(q, keys, values, own, return_lse=True))
    return merge(parts)[0]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=False),
        Mask(causal=True, offset=KEYS - QUERIES),
        Mask(causal=True, window=4, offset=KEYS - QUERIES),
        Mask(causal=True, offset=-2),  # the first two queries see nothing
    ],
    ids=str,
)
def test_parts_give_the_whole_with_its_gradients(arrays, mask):
    """1e-6 of the largest number in float32: sums in another order; and no NaN of blind rows."""
    *inputs, weights = arrays
    found, expected = (
        jax.jit(
            jax.value_and_grad(
                lambda q, k, v, f=function: jnp.sum(weights * f(q, k, v, mask)), (0, 1, 2)
            )
        )(*inputs)
        for function in (in_parts, whole)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * scale)


def test_the_log_sum_exp_is_that_of_the_scores(arrays):
    q, k, v, _ = arrays
    mask = Mask(causal=True, offset=-2)
    _, lse = attention(q, k, v, mask, scale=0.3, return_lse=True)
    scores = 0.3 * np.einsum("bqhd,bkhd->bqhk", q, np.repeat(k, HEADS // KV_HEADS, axis=2))
    for query in range(QUERIES):
        seen = scores[:, query, :, : max(0, query - 1)].astype(np.float64)
        expected = np.logaddexp.reduce(seen, axis=-1, initial=-np.inf)
        np.testing.assert_allclose(lse[:, query], expected, rtol=1e-6)


def test_who_returns_none_says_so(arrays):
    q, k, v, _ = arrays
    with pytest.raises(ValueError, match="'cudnn' cannot serve this call: it returns no log-sum"):
        attention(q, k, v, Mask(causal=True), implementation="cudnn", return_lse=True)
