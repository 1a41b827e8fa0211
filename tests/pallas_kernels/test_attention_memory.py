"""Memory of the long form of chunked attention grows with the length, not with its square."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import Mask, attention
from pallas_kernels.attention.chunked import BLOCKS, block_rows


def temporary_bytes(length: int, implementation: str) -> int:
    """Scratch memory of the compiled output and gradients of q, k and v."""
    heads = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, Mask(causal=True), implementation=implementation))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(heads, heads, heads).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("implementation", ["chunked"])
def test_memory_is_linear(implementation):
    shortest = 2 * BLOCKS * block_rows(10**6)
    once, twice, four_times = (
        temporary_bytes(times * shortest, implementation) for times in (1, 2, 4)
    )
    # What does not grow (the tiles) makes the ratio smaller than 2; a square would give 4.
    assert twice < 2.1 * once
    assert four_times < 2.1 * twice
    assert four_times < temporary_bytes(shortest, "reference")
