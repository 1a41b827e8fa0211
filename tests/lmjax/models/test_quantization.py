"""Models whose weights are kept in few bits: the same logits as with the weights made float."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.models import (
    DynamicInt8,
    ExpertsConfig,
    Float8,
    Int4,
    Int8,
    LoRA,
    Quantization,
    abstract,
    initialize,
    merge_adapters,
    plain_batch,
    quantized_weights,
    with_quantization,
)
from lmjax.parallel import Mesh, training_layout
from tests.lmjax.models.test_quantized import MODEL as ADAPTED
from tests.lmjax.models.test_quantized import TOKENS
from tests.whole_logits import logits_of_config

MODEL = replace(ADAPTED, lora=None, num_layers=1)
EXPERTS = replace(MODEL, feed_forward=ExpertsConfig(size=32, experts=4))
INT4 = Quantization(weights=Int4(symmetric=False, block=8), tables=Int8(block=16))


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def logits(config, params):
    """Of the tokens, on the mesh that is set."""
    _, shapes = abstract(config, training_layout())
    jax.tree.map(_alike, params, shapes)
    return logits_of_config(config, params, plain_batch(TOKENS))


def _alike(array, shape):
    assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    assert array.sharding.spec == shape.sharding.spec


def drawn(model):
    return initialize(model, training_layout(), jax.random.key(0))[1]


@pytest.mark.parametrize(
    ("model", "quantization", "shape"),
    [
        (MODEL, INT4, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(
            EXPERTS,
            Quantization(weights=Int8(block=16)),
            {"fsdp": 2, "expert": 2, "tensor": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["int4", "experts"],
)
def test_any_mesh_gives_the_logits_of_the_weights_made_float(model, quantization, shape):
    """On one device, and cut over eight: 1e-5 of logits of about 1, for products in parts."""
    found = []
    for sizes in ({"fsdp": 1}, shape):
        with jax.set_mesh(Mesh(**sizes).build(jax.devices()[: math.prod(sizes.values())])):
            params, config = with_quantization(drawn(model), model, quantization)
            found.append(logits(config, params))
            if sizes == {"fsdp": 1}:
                as_float, plain = with_quantization(params, config, None)
                assert plain == model
                expected = logits(plain, as_float)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=1e-5)


def test_only_the_named_layers_are_kept_so():
    """Of experts never the router; a name of no layer is refused."""
    every = quantized_weights(replace(EXPERTS, quantization=Quantization()))
    names = {".".join(path[1:]) for path in every}
    assert names == {
        *(f"attention.{name}.weight" for name in ("query", "key", "value", "output")),
        *(f"feed_forward.experts.{name}.weight" for name in ("up", "down", "gate")),
    }
    some = Quantization(layers=("query", "feed_forward.*"))
    assert len(quantized_weights(replace(EXPERTS, quantization=some))) == 4
    with pytest.raises(UserError, match=r"'wrong' is for no dense layer of the blocks.*query"):
        abstract(replace(MODEL, quantization=Quantization(layers=("wrong",))), training_layout())


def test_adapters_beside_few_bits_are_merged_into_floats():
    model = replace(MODEL, lora=LoRA(rank=2, layers=("*",)))
    params, config = with_quantization(drawn(model), model, Quantization(weights=Float8()))
    merged, plain = merge_adapters(params, config)
    assert (plain.lora, plain.quantization) == (None, None)
    np.testing.assert_allclose(logits(plain, merged), logits(config, params), rtol=0, atol=1e-5)


def test_integer_products_come_near():
    """Inputs in 8 bits too: 2 percent of the logits' root mean square."""
    quantization = Quantization(weights=Int8(block=None), activations=DynamicInt8())
    before = drawn(MODEL)
    params, config = with_quantization(before, MODEL, quantization)
    found, expected = logits(config, params), logits(MODEL, before)
    error = np.sqrt(np.mean(np.square(found - expected)) / np.mean(np.square(expected)))
    assert 1e-5 < error < 0.02
    again, _ = with_quantization(params, config, None)
    assert jax.tree.structure(again) == jax.tree.structure(before)


def test_training_that_is_aware_computes_with_the_rounded_weights():
    """Logits are those of the model that is kept so, and gradients go past the rounding."""
    quantization = Quantization(weights=Int4(block=8))
    aware = replace(MODEL, quantization=replace(quantization, aware=True))
    params = drawn(MODEL)
    kept, config = with_quantization(params, MODEL, quantization)
    np.testing.assert_allclose(logits(aware, params), logits(config, kept), rtol=0, atol=1e-5)
    graph, _ = abstract(aware, training_layout())

    @jax.jit
    @jax.grad
    def gradient(params):
        model = nnx.merge(graph, params)
        return (model.logits(model(plain_batch(TOKENS))[0])[..., :97] ** 2).mean()

    weights = gradient(params)["blocks"]["feed_forward"]["up"]["weight"]
    assert np.abs(weights).max() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "quantization.layers is empty"),
        ({"activations": DynamicInt8()}, "DynamicInt8: products of integers need weights=Int8"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Quantization(**fields)
