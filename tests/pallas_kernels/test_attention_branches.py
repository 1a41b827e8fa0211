"""Branches of rows: attention runs them as rows of their own, and the mask of all pairs says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Branches, LinearBias, Mask, attention

SHARED, LENGTH, COUNT, HEADS, KV_HEADS, SIZE = 5, 4, 3, 4, 2, 8
COLUMNS = SHARED + COUNT * LENGTH
# Two texts begin in the shared columns of the first row; its second branch goes on from both.
SEGMENTS = np.array(
    [
        [1, 1, 2, 2, 2, *(1, 1, 1, 0), *(2, 2, 1, 1), *(2, 2, 2, 2)],
        [1, 1, 1, 0, 0, *(1, 1, 1, 1), *(1, 1, 0, 0), *(0, 0, 0, 0)],
    ]
)


def mask(shared=SHARED):
    own = jnp.asarray(SEGMENTS[:, SHARED - shared :])
    branches = Branches(shared, LENGTH)
    return Mask(causal=True, query_segments=own, key_segments=own, branches=branches)


def arrays(shared=SHARED):
    draw = np.random.default_rng(0).normal
    length, heads = COLUMNS - SHARED + shared, (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [jnp.asarray(draw(size=(2, length, n, SIZE)), jnp.float32) for n in heads]


def over_all_pairs(q, k, v, mask):
    """softmax(q k^T / sqrt(size)) v and the log of its sums; a loop over pairs makes the mask."""
    shared, length = mask.branches
    segments = SEGMENTS[:, SHARED - shared :]
    seen = np.zeros((2, q.shape[1], q.shape[1]), bool)
    for row, i, j in np.ndindex(seen.shape):
        apart = j >= shared and (i < shared or (i - shared) // length != (j - shared) // length)
        same = segments[row, i] == segments[row, j] != 0
        seen[row, i, j] = j <= i and same and not apart
    k, v = (jnp.repeat(a, HEADS // KV_HEADS, axis=2) for a in (k, v))
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / SIZE**0.5
    scores = jnp.where(seen[:, None], scores, -1e30)
    weights = jnp.where(seen[:, None], jax.nn.softmax(scores), 0)
    lse = jnp.where(seen.any(2)[:, None], jax.nn.logsumexp(scores, axis=3), -jnp.inf)
    return jnp.einsum("bhij,bjhd->bihd", weights, v), jnp.swapaxes(lse, 1, 2)


@pytest.mark.parametrize("shared", [0, SHARED])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_branches_see_what_they_share_and_themselves(implementation, shared):
    """Output, log-sum-exp and gradients; 2e-6: sums of 17 float32 numbers of size 1."""
    *inputs, weights = arrays(shared)
    seen = jnp.asarray(SEGMENTS[:, SHARED - shared :, None] != 0)

    def by_kernel(q, k, v, mask):
        return attention(q, k, v, mask, implementation=implementation, return_lse=True)

    def found(function):
        def total(*inputs):
            output, lse = function(*inputs, mask(shared))
            lse = jnp.where(seen, lse, 0)
            return jnp.sum(weights * output) + jnp.sum(weights[..., 0] * lse), (output, lse)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)

    for one, other in zip(
        jax.tree.leaves(found(by_kernel)), jax.tree.leaves(found(over_all_pairs)), strict=True
    ):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * scale)


def test_a_mask_of_branches_as_an_array():
    """As `allowed` has it, which kernels never ask: they see rows without branches."""
    *inputs, _ = arrays()
    expected = over_all_pairs(*inputs, mask())[0]
    q, k, v = inputs
    k, v = (jnp.repeat(a, HEADS // KV_HEADS, axis=2) for a in (k, v))
    seen = mask().dense(COLUMNS, COLUMNS)
    scores = jnp.where(seen, jnp.einsum("bihd,bjhd->bhij", q, k) / SIZE**0.5, -1e30)
    found = jnp.einsum("bhij,bjhd->bihd", jnp.where(seen, jax.nn.softmax(scores), 0), v)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_sinks_of_branches():
    """A score without a value in every query's sum: the rest of what it sees has its share."""
    *inputs, _ = arrays()
    sinks = jnp.linspace(-1, 2, HEADS)
    output, lse = over_all_pairs(*inputs, mask())
    share = jnp.exp(lse - jnp.logaddexp(lse, sinks))
    found = attention(*inputs, mask(), sinks=sinks)
    np.testing.assert_allclose(found, output * share[..., None], rtol=0, atol=2e-6)


def test_what_branches_cannot_have():
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match="a window counts keys"):
        Mask(causal=True, window=3, branches=Branches(SHARED, LENGTH))
    with pytest.raises(ValueError, match="neither a bias nor dropout"):
        attention(q, k, v, mask(), LinearBias(jnp.ones(HEADS)))
    with pytest.raises(ValueError, match="17 queries and 16 keys, of which 5 are shared"):
        attention(q, k[:, 1:], v[:, 1:], mask())
