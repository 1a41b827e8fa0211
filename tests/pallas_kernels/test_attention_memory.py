"""The long form of chunked attention: memory grows with the length, not with its square."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention
from pallas_kernels.attention.chunked import BLOCKS, block_rows


def temporary_bytes(length: int, implementation: str, ranked: bool) -> int:
    """Scratch memory of the compiled output and gradients of q, k and v."""
    heads = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    ranks = jax.ShapeDtypeStruct((1, length), jnp.int32) if ranked else None

    def loss(q, k, v, ranks):
        mask = Mask(causal=True, query_ranks=ranks, key_ranks=ranks)
        return jnp.sum(attention(q, k, v, mask, implementation=implementation))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradient.lower(heads, heads, heads, ranks).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("ranked", [False, True], ids=["places", "ranks"])
@pytest.mark.parametrize("implementation", ["chunked"])
def test_memory_is_linear(implementation, ranked):
    shortest = (BLOCKS + 1) * block_rows(10**6, None)
    once, twice, four_times = (
        temporary_bytes(times * shortest, implementation, ranked) for times in (1, 2, 4)
    )
    # What does not grow (the tiles) makes the ratio smaller than 2; a square would give 4.
    assert twice < 2.1 * once
    assert four_times < 2.1 * twice
    assert four_times < temporary_bytes(shortest, "reference", ranked)


def test_the_long_form_gives_the_same():
    """A length of several default blocks and a rest; the small cases use smaller blocks."""
    mask = Mask(causal=True, window=900)
    length = BLOCKS * block_rows(10**6, mask.window) + 70
    q, k, v, d_output = jax.random.normal(jax.random.key(0), (4, 1, length, 1, 8))

    @functools.partial(jax.jit, static_argnames="implementation")
    def results(implementation):
        def apply(q, k, v):
            return attention(q, k, v, mask, implementation=implementation)

        output, pull = jax.vjp(apply, q, k, v)
        return output, *pull(d_output)

    for one, other in zip(results("chunked"), results("reference")):
        np.testing.assert_allclose(one, other, atol=1e-5)  # float32 sums of 900
