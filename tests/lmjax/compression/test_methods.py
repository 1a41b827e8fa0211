"""Ways to small weights, on tiny models of several families' parts."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from lmjax.compression.calibration import batches_of, stacks_of, walk
from lmjax.compression.methods import Quantizer
from lmjax.config import UserError, replace
from lmjax.models import (
    DynamicInt8,
    EncoderDecoderConfig,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    Int4,
    Int8,
    LayerNormConfig,
    Parallel,
    Quantization,
    StaticInt8,
    abstract,
    initialize,
    with_quantization,
)
from lmjax.parallel import Mesh, training_layout
from tests.lmjax.models.test_quantized import MODEL as ADAPTED

LLAMA = replace(ADAPTED, lora=None)
# A kind with one norm for both, biases, layers without gates.
FALCON = replace(
    LLAMA,
    attention=replace(LLAMA.attention, num_kv_heads=8, bias=True, output_bias=True),
    feed_forward=FeedForwardConfig(size=64),
    norm=LayerNormConfig(),
    arrangement=Parallel(),
)
T5 = EncoderDecoderConfig(
    vocab_size=97,
    hidden=32,
    num_layers=1,
    encoder_layers=1,
    max_length=None,
    attention=replace(LLAMA.attention, num_kv_heads=8, positions=None),
    feed_forward=GatedFeedForwardConfig(size=64),
    positions=None,
)
ROWS = np.random.default_rng(0).integers(0, 97, (16, 24)).astype(np.int32)
QUIET = {"tell": lambda text: None}


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def drawn(model, seed=0):
    """Parameters with inputs of very different sizes, as large models have them."""
    params = initialize(model, training_layout(), jax.random.key(seed))[1]
    rng = np.random.default_rng(seed)

    def wide(path, leaf):
        if path[-1].key != "scale":
            return leaf
        return leaf * np.exp(rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(wide, params)


@functools.cache
def program(config):
    """Logits of parameters and a batch, compiled."""
    graph, _ = abstract(config, training_layout())

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    return run


def logits(config, params):
    (batch,) = batches_of(config, ROWS[:8])
    return np.asarray(program(config)(params, batch))[..., :97]


@pytest.mark.parametrize(
    ("model", "method"),
    [(LLAMA, "awq"), (FALCON, "smoothquant"), (T5, "smoothquant")],
    ids=["llama", "falcon", "t5"],
)
def test_scales_that_are_moved_change_no_logits(model, method):
    """To 1e-5 of logits of about 1, before anything is rounded."""
    params = drawn(model)
    make = Quantizer(Quantization(weights=Int4(block=8)), method, ROWS, **QUIET)
    scaled = make.scaled(model, params)
    before = traverse_util.flatten_dict(params)
    for path, leaf in traverse_util.flatten_dict(scaled).items():
        if path[-2:] == ("query", "weight") and "encoder" not in path:
            assert np.abs(leaf - before[path]).max() > 1e-3
    expected = logits(model, params)
    np.testing.assert_allclose(logits(model, scaled), expected, rtol=0, atol=1e-5)


def test_methods_that_calibrate_come_nearer():
    """Errors of the logits of a LLaMA in 4 bits: of GPTQ and AWQ less than of the nearest."""
    params = drawn(LLAMA)
    expected, errors = logits(LLAMA, params), {}
    for method in ("nearest", "gptq", "awq"):
        make = Quantizer(Quantization(weights=Int4(block=16)), method, ROWS, **QUIET)
        small, config = make(LLAMA, params)
        shapes = abstract(config, training_layout())[1]
        assert jax.tree.structure(small) == jax.tree.structure(shapes)
        errors[method] = np.sqrt(np.mean(np.square(logits(config, small) - expected)))
    assert errors["gptq"] < 0.9 * errors["nearest"]
    assert errors["awq"] < errors["nearest"]


def test_inputs_in_8_bits_with_smoothing():
    """Static scales are the largest inputs over 127; the logits come near with either kind."""
    params = drawn(LLAMA)
    expected = logits(LLAMA, params)
    for kind in (StaticInt8(), DynamicInt8()):
        quantization = Quantization(weights=Int8(block=None), activations=kind)
        make = Quantizer(quantization, "smoothquant", ROWS, **QUIET)
        small, config = make(LLAMA, params)
        error = np.sqrt(np.mean(np.square(logits(config, small) - expected)))
        assert error < 0.03 * np.sqrt(np.mean(np.square(expected)))
        scales = [
            leaf
            for path, leaf in traverse_util.flatten_dict(small).items()
            if path[-1] == "input_scale"
        ]
        assert len(scales) == 7 * isinstance(kind, StaticInt8)
        assert all(leaf.shape == (2,) and (leaf < 1).all() for leaf in scales)


def test_recorded_inputs_are_those_of_the_layers():
    """The first layer's queries read its norm of the embeddings: computed here in numpy."""
    params = drawn(LLAMA)
    found = {}

    def note(entry, moments):
        found[entry] = moments

    walk(LLAMA, params, stacks_of(LLAMA)[0], list(batches_of(LLAMA, ROWS)), note)
    x = np.asarray(params["embedding"]["table"])[ROWS].astype(np.float64)
    x = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + LLAMA.norm.epsilon)
    x = (x * np.asarray(params["blocks"]["attention_norm"]["scale"])[0]).reshape(-1, 32)
    own = found[0][("attention", "query")]
    np.testing.assert_allclose(own.second, x.T @ x / len(x), rtol=0, atol=1e-4)
    np.testing.assert_allclose(own.magnitudes, np.abs(x).sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(own.largest, np.abs(x).max(axis=0), rtol=1e-4)
    assert float(own.count) == len(x) and len(found) == LLAMA.num_layers


@pytest.mark.parametrize(
    ("quantization", "method", "message"),
    [
        (Quantization(weights=Int4()), "gptq", "method=gptq needs texts: give calibration=FILE"),
        (
            Quantization(weights=Int8(block=None), activations=StaticInt8()),
            "nearest",
            "activations=static needs texts",
        ),
    ],
)
def test_what_a_method_lacks_is_said(quantization, method, message):
    with pytest.raises(UserError, match=message):
        Quantizer(quantization, method)(LLAMA, {})


def test_small_weights_are_those_that_were_chosen():
    """What GPTQ chose is what the model computes with: its float form gives the same logits."""
    make = Quantizer(Quantization(weights=Int4(block=16)), "gptq", ROWS, **QUIET)
    small, config = make(FALCON, drawn(FALCON))
    as_float, plain = with_quantization(small, config, None)
    np.testing.assert_allclose(logits(config, small), logits(plain, as_float), rtol=0, atol=1e-5)
