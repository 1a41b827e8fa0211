"""Functions on each device inside of a `jax.shard_map`: gradients against those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.manual_axes import on_each_device, vary_alike, vary_over


@jax.custom_vjp
def product(x, w):
    """A product with its own backward pass, as kernels have it."""
    return x @ w


def _forward(x, w):
    return x @ w, (x, w)


def _backward(kept, gradient):
    x, w = kept
    return gradient @ w.T, x.T @ gradient


product.defvjp(_forward, _backward)


def stage_mesh():
    """Two stages of two devices."""
    return jax.make_mesh(
        (2, 2), ("stage", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices, real or simulated")
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "kernel"])
def test_gradients_inside_of_a_stage(check_vma):
    """Types inside of kernels know nothing of the outer axis; 1e-6: one sum in another order."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 4, 3)).astype(np.float32)
    w = draw.normal(size=(3, 5)).astype(np.float32)

    def divided(x, w):
        run = on_each_device(lambda x, w: product(*vary_alike((x, w))), P("tensor", None), **how)
        return jnp.sum(jnp.sin(run(x, w)))

    def body(x, w):
        total, pull = jax.vjp(divided, x[0], vary_over(w, ("stage",)))
        d_x, d_w = pull(jnp.ones_like(total))
        return d_x[None], jax.lax.psum(d_w, "stage")

    how = {"check_vma": check_vma}
    mesh = stage_mesh()
    with jax.set_mesh(mesh):
        specs = P("stage"), P()
        run = jax.shard_map(body, in_specs=specs, out_specs=specs, axis_names={"stage"})
        x_there = jax.device_put(x, jax.NamedSharding(mesh, P("stage", "tensor")))
        found = jax.device_get(jax.jit(run)(x_there, w))
    expected = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))(x, w)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
