"""cuDNN without a GPU: what it refuses, and that a mask becomes the right arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention
from pallas_kernels.attention.cudnn import arguments, unsupported

SEGMENTS = jnp.ones((1, 16), jnp.int32)


def heads(dtype=jnp.bfloat16, head_dim=16, length=16):
    return jnp.ones((1, length, 2, head_dim), dtype)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it need not refuse")
def test_without_a_gpu_it_refuses():
    with pytest.raises(ValueError, match=r"'cudnn' cannot serve this call: it needs an NVIDIA GPU"):
        attention(heads(), heads(), heads(), Mask(), implementation="cudnn")


@pytest.mark.parametrize(
    ("q", "mask", "more", "reason"),
    [
        (heads(jnp.float32), Mask(), {}, "float32"),
        (heads(head_dim=12), Mask(), {}, "head_dim 12"),
        (heads(head_dim=192), Mask(), {}, "head_dim 192"),
        (heads(), Mask(query_segments=SEGMENTS, key_segments=SEGMENTS), {}, "query_segments"),
        (heads(), Mask(causal=True, query_ranks=SEGMENTS, key_ranks=SEGMENTS), {}, "query_ranks"),
        (heads(), Mask(window=4), {}, "window without causal"),
        (heads(), Mask(causal=True, offset=2), {}, "offset"),
        (heads(length=8), Mask(causal=True), {}, "unequal"),
        (heads(), Mask(), {"bias": jnp.zeros((1, 1, 1, 16))}, "bias"),
        (heads(), Mask(), {"dropout": (0.1, jax.random.key(0))}, "dropout"),
        (heads(), Mask(), {"softcap": 50.0}, "softcap"),
    ],
)
def test_what_it_cannot_say_has_a_reason(q, mask, more, reason):
    keys = heads(q.dtype, q.shape[-1])
    assert reason in unsupported(q, keys, keys, mask, **more)


@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(causal=True, window=1), Mask(causal=True, window=5)]
)
def test_arguments_mean_the_mask(mask):
    """jax's own plain implementation takes the same arguments: it must give what ours gives."""
    assert unsupported(heads(), heads(), heads(), mask) is None
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 16))
    theirs = jax.nn.dot_product_attention(q, k, v, implementation="xla", **arguments(mask))
    ours = attention(q, k, v, mask, implementation="reference")
    np.testing.assert_allclose(theirs, ours, atol=1e-6)  # float32, sums of 16
