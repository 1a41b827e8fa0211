"""Products with operands of 8 bits, and gradients summed in float32, by bounds in closed form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lmjax.config import UserError, replace
from lmjax.models import ExpertsConfig, TransformerConfig, gpt2
from lmjax.models.initializers import Normal
from lmjax.models.linear import Builder
from lmjax.models.products import BACKWARD, FORWARD, Products, bound_of_error, in_8_bits
from lmjax.parallel import Mesh, training_layout
from pallas_kernels import topologies

INPUTS, OUTPUTS = (("embed", 32),), (("heads", 4), (None, 8))
SINGLE = 2.0**-24  # relative error of a float32 number


def layer(products: Products, dtype: str = "bfloat16"):
    rngs = nnx.Rngs(jax.random.key(0))
    builder = Builder(32, 2, Normal(std=0.3), dtype, training_layout(), rngs, products)
    return builder.linear(INPUTS, OUTPUTS, bias=False)


def graph_and_arrays(products: Products, dtype: str = "bfloat16"):
    """A layer as a function of its weight, the weight, an input and a gradient of the output."""
    graph, state = nnx.split(layer(products, dtype))
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (4, 16, 32)).astype(dtype)
    gradient = (1e-3 * jax.random.normal(keys[1], (4, 16, 4, 8))).astype(dtype)
    weight = np.asarray(state["weight"][...])

    def run(weight, x, gradient):
        def call(weight, x):
            return nnx.merge(graph, nnx.State({"weight": nnx.Param(weight)}))(x)

        y, pull = jax.vjp(call, weight, x)
        return y, *pull(gradient)

    return jax.jit(run), (jnp.asarray(weight), x, gradient)


@pytest.fixture
def one():
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        yield


def wide(*shape: int) -> jax.Array:
    """Numbers over twenty powers of two, with a few zeros."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape) * np.exp2(rng.uniform(-16, 4, shape))
    values[rng.random(shape) < 0.05] = 0
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_rounding_to_8_bits_stays_within_half_a_step(dtype, size):
    a = wide(4096) * size
    found, scale = in_8_bits(a, dtype)
    error = np.abs(np.asarray(found, np.float64) * float(scale) - np.asarray(a, np.float64))
    assert np.isfinite(error).all() and found.dtype == dtype
    assert (error <= np.asarray(bound_of_error(a, dtype), np.float64)).all()
    # The range is used: the largest number is in the uppermost power of two, or next to it.
    assert (
        float(np.max(np.abs(np.asarray(found, np.float32)))) >= float(jnp.finfo(dtype).max) / 2.01
    )


def test_scales_of_nothing():
    for values in (jnp.zeros(4), jnp.asarray([1.0, jnp.inf])):
        assert float(in_8_bits(values, FORWARD)[1]) == 1.0


def bounded(a, b, error_a, error_b, subscripts: str, rounding: float):
    """Product of a and b, and how far that of their roundings may be from it, element by element.

    |a b - a' b'| <= |a| e_b + e_a |b| + e_a e_b, summed; and what float32 sums and the result's
    type add.
    """
    a, b, error_a, error_b = (np.asarray(value, np.float64) for value in (a, b, error_a, error_b))
    whole = np.einsum(subscripts, np.abs(a), np.abs(b))
    off = np.einsum(subscripts, np.abs(a) + error_a, np.abs(b) + error_b) - whole
    terms = a.size * b.size / whole.size  # more than the number of terms of each sum
    return np.einsum(subscripts, a, b), off + (whole + off) * (terms * SINGLE + rounding)


def test_fp8_products_stay_within_the_bound(one):
    """Forward and both products of backward, each element of them."""
    run, (weight, x, gradient) = graph_and_arrays(Products(fp8=True))
    found = [np.asarray(a, np.float64) for a in run(weight, x, gradient)]
    weight = weight.astype(jnp.bfloat16)
    half = 2.0**-8  # the result is in bfloat16
    e_x, e_w = bound_of_error(x, FORWARD), bound_of_error(weight, FORWARD)
    e_g = bound_of_error(gradient, BACKWARD)
    expected = [
        bounded(x, weight, e_x, e_w, "bsi,ihd->bshd", half),
        bounded(x, gradient, e_x, e_g, "bsi,bshd->ihd", SINGLE),
        bounded(gradient, weight, e_g, e_w, "bshd,ihd->bsi", half),
    ]
    for value, (exact, bound) in zip(found, expected, strict=True):
        assert (np.abs(value - exact) <= bound).all()
        # It is no bound that anything would keep to: 8 bits show.
        assert np.abs(value - exact).max() > 0.02 * bound.max()


def test_gradients_of_weights_in_float32(one):
    """To the bit of float32 sums, where by default they have the 8 bits of bfloat16."""
    run, arrays = graph_and_arrays(Products(gradient_sum="float32"))
    y, d_weight, d_x = run(*arrays)
    plain_y, plain_d_weight, plain_d_x = graph_and_arrays(Products())[0](*arrays)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(plain_y, np.float32))
    np.testing.assert_allclose(
        np.asarray(d_x, np.float32), np.asarray(plain_d_x, np.float32), rtol=2.0**-7, atol=1e-6
    )
    _, x, gradient = (np.asarray(a, np.float64) for a in arrays)
    exact = np.einsum("bsi,bshd->ihd", x, gradient)
    error, plain = (np.abs(np.asarray(a, np.float64) - exact) for a in (d_weight, plain_d_weight))
    assert error.max() < 1e-6 * np.abs(exact).max() and plain.max() > 1e-4 * np.abs(exact).max()


def test_layers_in_float32_are_exact_whatever_the_setting(one):
    """As a router's, and that of labels."""
    run, arrays = graph_and_arrays(Products(fp8=True), "float32")
    expected = graph_and_arrays(Products(), "float32")[0](*arrays)
    for a, b in zip(run(*arrays), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_products_on_a_mesh_are_those_of_one_device():
    """Scales are of whole arrays: 8 bits are the same ones, and float32 sums alone differ."""
    products = Products(fp8=True, gradient_sum="float32")
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        run, arrays = graph_and_arrays(products)
        expected = [np.asarray(a, np.float32) for a in run(*arrays)]
        arrays = [np.asarray(a) for a in arrays]
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        run, _ = graph_and_arrays(products)
        rows = ("data", "fsdp")
        specs = P("fsdp", "tensor", None), P(rows), P(rows, None, "tensor")
        found = run(*(jax.device_put(a, spec) for a, spec in zip(arrays, specs, strict=True)))
        assert jax.typeof(found[1]).sharding.spec == P("fsdp", "tensor", None)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("gradient_sum", "kinds"), [("computation", {"bf16"}), ("float32", {"f32"})]
)
def test_gradients_are_summed_in_the_dtype_that_is_set(gradient_sum, kinds):
    """In a program for four v4 chips: CPUs sum bfloat16 in float32 whatever is asked for."""
    try:
        mesh = Mesh(data=2, fsdp=2).build(list(topologies.tpu("v4")))
    except topologies.NoCompiler as missing:
        pytest.skip(str(missing))
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        _, arrays = graph_and_arrays(Products())
    with jax.set_mesh(mesh):
        built = layer_shapes(Products(gradient_sum=gradient_sum))
        specs = P("fsdp"), P(("data", "fsdp")), P(("data", "fsdp"))
        shapes = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))
            for a, spec in zip(arrays, specs, strict=True)
        ]
        text = jax.jit(built).lower(*shapes).compile().as_text()
    sums = re.findall(r" = \(?(\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", text)
    assert sums and {kind for kind, _ in sums} == kinds
    if gradient_sum == "float32":  # between replicas a shard goes, half of the weight
        assert "16,4,8" in {shape for _, shape in sums}


def layer_shapes(products: Products):
    """The gradient of a layer's weight, as a function that needs no device to be made."""
    graph = None

    def make():
        nonlocal graph
        graph, state = nnx.split(layer(products))
        return state

    jax.eval_shape(make)

    def d_weight(weight, x, gradient):
        def call(weight):
            return nnx.merge(graph, nnx.State({"weight": nnx.Param(weight)}))(x)

        return jax.vjp(call, weight)[1](gradient)[0]

    return d_weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "products.fp8=true: what is no product has more bits"),
        (dict(feed_forward=ExpertsConfig(experts=2)), "products of experts have no 8 bits"),
    ],
)
def test_settings_that_do_not_go_together(change, message):
    fp8 = {"dtype": "bfloat16", "products": Products(fp8=True)} | change
    with pytest.raises(UserError, match=message):
        replace(gpt2("124M"), **fp8)
    assert isinstance(replace(gpt2("124M"), **(fp8 | {"products": Products()})), TransformerConfig)
