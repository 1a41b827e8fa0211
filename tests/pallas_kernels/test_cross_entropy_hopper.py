"""Kernels of the cross-entropy for Hopper: by Pallas' GPU interpreter, and for described chips."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import topologies
from pallas_kernels.cross_entropy import chunked, cross_entropy, hopper
from pallas_kernels.target import interpreted
from tests.pallas_kernels.gpu_interpreter import hopper_interpreted
from tests.pallas_kernels.test_cross_entropy_tpu import draw, largest_array, terms_and_gradients

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "rows", "embed", "softcap", "mean", "races"),
    [
        (50, 200, 24, 2.0, True, False),
        (300, 500, 400, None, False, False),
        (1, 1, 3, None, True, True),
    ],
)
def test_terms_and_gradients(monkeypatch, tokens, rows, embed, softcap, mean, races):
    """Against the plain form in float32; several parts of the head, odd sizes, races looked for."""
    monkeypatch.setattr(hopper, "PART_BYTES", 2**17)
    words = max(1, rows - 10)
    given = *draw(tokens, rows, words, embed), jnp.asarray(words, jnp.int32)
    options = {"scale": 0.3, "softcap": softcap, "mean": mean}
    with hopper_interpreted(monkeypatch, detect_races=races):
        run = functools.partial(terms_and_gradients, hopper.vocabulary_terms, **options)
        found = jax.jit(run)(*given)
    run = functools.partial(terms_and_gradients, chunked.vocabulary_terms, **options)
    for one, other in zip(found, jax.jit(run)(*given), strict=True):
        other = np.asarray(other, np.float64)
        # float32 sums of up to 500 terms in another order.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


def test_what_it_cannot_serve():
    hidden, head, targets, _ = map(jnp.asarray, draw(8, 128, 128))
    half = [array.astype(jnp.bfloat16) for array in (hidden, head)]

    def call(hidden, head, **options):
        return jax.eval_shape(
            functools.partial(cross_entropy, vocabulary=100, implementation="hopper", **options),
            *(hidden, head, targets),
        )

    with pytest.raises(ValueError, match="it needs a Hopper GPU and the device is a cpu"):
        call(*half)
    a100 = "NVIDIA A100-SXM4-80GB"
    with interpreted(a100, False), pytest.raises(ValueError, match=f"the device is a {a100}"):
        call(*half)
    with interpreted(H100, False):
        with pytest.raises(ValueError, match="dtypes float32 and float32"):
            call(hidden, head)
        with pytest.raises(ValueError, match="the largest logit"):
            call(*half, largest=True)
        with pytest.raises(ValueError, match="chunk=4, it holds no logits"):
            call(*half, chunk=4)
        jaxpr = jax.make_jaxpr(functools.partial(cross_entropy, vocabulary=100))
        assert "pallas_call" in str(jaxpr(*half, targets)) or "kernel" in str(jaxpr(*half, targets))


@pytest.mark.slow
@pytest.mark.skipif(not topologies.has_cuda_compiler(), reason="needs lmjax[cuda]")
def test_compiles_for_a_described_chip():
    devices = np.array(topologies.hopper(4)).reshape(2, 2)
    mesh = Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    tokens, rows, embed = 8192, 8192, 256  # of a device

    def array(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def loss(hidden, head, targets):
        nll, log_z = cross_entropy(hidden, head, targets, vocabulary=2 * rows - 5)
        return jnp.sum(nll) + 1e-4 * jnp.sum(log_z**2)

    with jax.set_mesh(mesh):
        program = (
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            .lower(
                array(jnp.bfloat16, P("fsdp", None, None), 2, tokens, embed),
                array(jnp.bfloat16, P("tensor", None), 2 * rows, embed),
                array(jnp.int32, P("fsdp", None), 2, tokens),
            )
            .compile()
            .as_text()
        )
    assert "mosaic_gpu" in program
    assert largest_array(program) <= hopper.PART_BYTES // 2 < tokens * rows
