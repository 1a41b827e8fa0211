"""The fast path on described TPUs: no array of all pairs, and memory linear in the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention
from tests.buffers import largest, shapes

LENGTH, HEADS, HEAD_DIM = 4096, 2, 64


def segments(length: int) -> np.ndarray:
    """Eight documents of unlike lengths, with padding at the end."""
    ends = (np.array([3, 7, 15, 22, 31, 42, 55, 62]) * length) // 64
    numbers = 1 + np.searchsorted(ends, np.arange(length), side="right")
    return np.where(numbers > len(ends), 0, numbers)


def arrays_of(name: str, length: int) -> dict[str, np.ndarray]:
    """The arrays of a mask, [length]."""
    positions = np.arange(length)
    return {
        "window": {},
        "packed": {"segments": segments(length)},
        "prefix": {"ranks": np.where(positions < length // 3, 0, positions)},
        "permutation": {"ranks": np.random.default_rng(0).permutation(length)},
    }[name]


def lowered(name: str, length: int, heads: int = HEADS, implementation: str = "tpu"):
    """Output and gradients, lowered for the chip that is set."""
    arrays = {key: a[None].astype(np.int32) for key, a in arrays_of(name, length).items()}

    def both(q, k, v, d_output, arrays):
        fields = {f"{side}_{key}": a for key, a in arrays.items() for side in ("query", "key")}
        mask = Mask(causal=True, window=1024 if name == "window" else None, **fields)

        def apply(q, k, v):
            return attention(q, k, v, mask, implementation=implementation)

        output, pull = jax.vjp(apply, q, k, v)
        return output, *pull(d_output)

    x = jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.bfloat16)
    return jax.jit(both).lower(x, x, x, x, jax.tree.map(shape, arrays))


def shape(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "packed", "prefix", "permutation"])
def test_no_array_of_all_pairs(described_tpu, name):
    described_tpu("v5e")
    # The inputs, padded to 128 numbers a head, are 1/16 of the pairs of one head.
    assert largest(lowered(name, LENGTH)) < LENGTH**2 / 4


def test_an_array_of_all_pairs_is_found():
    """On the CPU, where the reference makes one."""
    assert largest(lowered("window", 256, implementation="reference")) >= HEADS * 256**2


def test_shapes_of_both_texts():
    hlo = "%a = bf16[1,2,4096]{2,1,0:T(8,128)} custom-call(f32[7] %b), s32[] %c, pred[3,3]"
    stable = "%0 = stablehlo.add %1, %2 : tensor<4x128xbf16>, tensor<i32>, tensor<5xi1>"
    assert shapes(hlo) == {(1, 2, 4096), (7,), (3, 3)}
    assert shapes(stable) == {(4, 128), (5,)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "packed"])
def test_memory_is_linear(described_tpu, name):
    described_tpu("v5e")
    for length in (16384, 131072):
        memory = lowered(name, length, heads=1).compile().memory_analysis()
        # Four arrays of [length, 128] in float32.
        assert memory.temp_size_in_bytes < 4 * 4 * 128 * length
