"""Weights in 4 and 8 bits: NF4's values, bounds of the error, bytes, products, and gradients."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lmjax.config import UserError, replace
from lmjax.models import (
    NF4,
    AttentionConfig,
    EncoderDecoderConfig,
    GatedFeedForwardConfig,
    LoRA,
    RMSNormConfig,
    Rotary,
    ScaledInt8,
    TransformerConfig,
    abstract,
    initialize,
    merge_adapters,
    plain_batch,
    with_base,
)
from lmjax.models.weight_codes import NF4_VALUES, from_bytes, to_bytes
from lmjax.parallel import Mesh, training_layout
from tests.lmjax.models.adapted import with_random_b
from tests.lmjax.models.compiled_codes import decode, encode

CODES = {"nf4": NF4(), "nf4, scales whole": NF4(double=False), "int8": ScaledInt8()}
# Dettmers et al. 2023, appendix E.
PUBLISHED = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
MODEL = TransformerConfig(
    vocab_size=97,
    hidden=32,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=4, positions=Rotary()),
    feed_forward=GatedFeedForwardConfig(size=64),
    norm=RMSNormConfig(),
    positions=None,
    lora=LoRA(rank=3, alpha=7.0, layers=("*",)),
)
TOKENS = np.random.default_rng(0).integers(0, 97, (8, 16)).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def with_code(code, model=MODEL):
    return replace(model, lora=replace(model.lora, base=code))


def loss_of(config):
    """A number that every parameter moves, on the mesh that is set."""
    layout = training_layout()
    graph, _ = abstract(config, layout)

    def loss(params, batch, key=None):
        model = nnx.merge(graph, params)
        batch = jax.tree.map(lambda a: layout.reshard(a, "batch", "seq"), batch)
        return jnp.mean(jnp.square(model.logits(model(batch, key=key)[0])))

    return loss


@functools.cache
def run_of(config):
    """Parameters -> logits of a model, compiled once."""
    graph, _ = abstract(config, training_layout())
    run = jax.jit(lambda params, batch: _logits(graph, params, batch))
    return lambda params: np.asarray(run(params, plain_batch(TOKENS)))[..., : config.vocab_size]


def logits(config, params):
    return run_of(config)(params)


def _logits(graph, params, batch):
    layout = training_layout()
    model = nnx.merge(graph, params)
    batch = jax.tree.map(lambda a: layout.reshard(a, "batch", "seq"), batch)
    return model.logits(model(batch)[0])


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


def slowly(weight, code):
    """The weight that is kept of a matrix whose blocks run down its columns, number by number."""
    found = np.zeros_like(weight)
    levels = np.arange(-127, 128) / 127 if isinstance(code, ScaledInt8) else np.array(PUBLISHED)
    for column in range(weight.shape[1]):
        for first in range(0, len(weight), code.block):
            block = weight[first : first + code.block, column]
            scale = np.abs(block).max()
            nearest = np.abs(block[:, None] / (scale or 1) - levels).argmin(axis=1)
            found[first : first + code.block, column] = levels[nearest] * scale
    return found


# ---- codes -------------------------------------------------------------------------------------


def test_the_values_are_the_quantiles_of_the_paper():
    """As published, to the last bit of float32; and by scipy's quantiles."""
    np.testing.assert_allclose(NF4_VALUES, np.float32(PUBLISHED), rtol=0, atol=2e-7)
    outermost = np.mean([1 - 1 / 30, 1 - 1 / 32])
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    values = np.sort([*above, 0, *below])
    np.testing.assert_allclose(NF4_VALUES, values / values.max(), rtol=1e-6, atol=0)


@settings(max_examples=20)
@given(
    # Few shapes, of each of which operations are compiled.
    shape=st.tuples(st.sampled_from((1, 9)), st.sampled_from((2, 5)), st.just(3)),
    axis=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_two_codes_in_a_byte_come_back(shape, axis, seed):
    codes = np.random.default_rng(seed).integers(0, 16, shape).astype(np.uint8)
    packed = jax.jit(to_bytes, static_argnums=1)(codes, axis)
    assert packed.shape[axis] == -(-shape[axis] // 2)
    found = jax.jit(from_bytes, static_argnums=(1, 2))(packed, axis, shape[axis])
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(
    "code", [NF4(double=False, block=8), ScaledInt8(block=8)], ids=["nf4", "int8"]
)
def test_a_weight_is_that_of_a_loop(code):
    """Nearest values of each block, by brute force: 1e-6; a block of zeros stays one."""
    weight = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    weight[8:16, 1] = 0
    stored = encode(code, weight, 0)
    found = np.asarray(decode(code, stored, 0, 20))
    np.testing.assert_allclose(found, slowly(weight, code), rtol=0, atol=1e-6)
    again = encode(code, found, 0)
    np.testing.assert_allclose(decode(code, again, 0, 20), found, rtol=0, atol=1e-6)
    sides = decode(code, encode(code, weight.T, 1), 1, 20)
    np.testing.assert_array_equal(np.asarray(sides).T, found)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("size", [64, 100, 512])
def test_the_error_of_a_block_is_bounded(name, size):
    """By half of the widest gap between two values, in the block's largest number.

    Scales in 8 bits move by half of a step more: 1/254 of the largest difference from their mean.
    """
    code, rng = CODES[name], np.random.default_rng(size)
    weight = rng.standard_normal((size, 5)) * np.exp(rng.standard_normal((1, 5)))
    weight = weight.astype(np.float32)
    found = np.asarray(decode(code, encode(code, weight, 0), 0, size))
    scales = np.array(
        [np.abs(weight[n : n + code.block]).max(axis=0) for n in range(0, size, code.block)]
    )
    half = 1 / 254 if isinstance(code, ScaledInt8) else np.diff(PUBLISHED).max() / 2
    step = np.abs(scales - scales.mean()).max() / 254 if code == NF4() else 0.0
    bound = np.repeat(scales * half + step * (1 + half), code.block, axis=0)[:size]
    assert (np.abs(found - weight) <= bound * (1 + 1e-5)).all()
    root = np.sqrt(np.mean(np.square(found - weight)) / np.mean(np.square(weight)))
    assert root < (0.01 if isinstance(code, ScaledInt8) else 0.11)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_not_lost(name, wrong):
    """All of its block is NaN, and with scales in 8 bits the whole weight."""
    code, weight = CODES[name], np.ones((8192, 2), np.float32)
    weight[5000, 1] = wrong
    found = np.asarray(decode(code, encode(code, weight, 0), 0, 8192))
    first = 5000 // code.block * code.block
    assert np.isnan(found[first : first + code.block, 1]).all()
    assert np.isnan(found).all() == (code == NF4())
    if code != NF4():
        assert np.isnan(found).sum() == code.block


# ---- models ------------------------------------------------------------------------------------


def with_codes(code, model=MODEL, seed=0):
    """Config and parameters, with adapters that do something."""
    layout = training_layout()
    float_params = with_random_b(initialize(model, layout, jax.random.key(seed))[1])
    return *with_base(float_params, model, code), float_params


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_products_and_merging_are_those_with_the_weights_made_float(name):
    """The same bits where nothing is added in another order; else 1e-5 of logits of about 1."""
    params, config, before = with_codes(CODES[name])
    assert config == with_code(CODES[name])
    as_float, without = with_base(params, config, None)
    assert without == MODEL
    found = logits(config, params)
    np.testing.assert_allclose(found, logits(MODEL, as_float), rtol=0, atol=1e-5)
    assert np.abs(found - logits(MODEL, before)).max() > 1e-4
    kept, decoded = flat(params), flat(as_float)
    for path, leaf in flat(before).items():
        if ".adapter." in path or not path.endswith(".weight") or "norm" in path:
            np.testing.assert_array_equal(decoded[path], leaf)
            np.testing.assert_array_equal(kept[path], leaf)
        else:
            assert not np.array_equal(decoded[path], leaf)
            assert path not in kept
    # Merging gives the float weights plus the adapters.
    merged, without = merge_adapters(params, config)
    expected, plain = merge_adapters(as_float, MODEL)
    assert without == plain == replace(MODEL, lora=None)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    np.testing.assert_allclose(logits(without, merged), found, rtol=0, atol=1e-5)


def test_random_parameters_are_those_of_the_float_model():
    """A fresh model of few bits is what is kept of the fresh model."""
    config = with_code(NF4())
    _, fresh = initialize(config, training_layout(), jax.random.key(0))
    _, base = initialize(MODEL, training_layout(), jax.random.key(0))
    kept = flat(with_base(base, MODEL, NF4())[0])
    for path, leaf in flat(fresh).items():
        np.testing.assert_allclose(leaf, kept[path], rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("code", "bits"), [(NF4(), 4.126 + 1e-3), (NF4(double=False), 4.5), (ScaledInt8(), 8.125)]
)
def test_bytes_of_the_base(code, bits):
    """4 bits a weight and a scale's share: 8 / 64, and 32 / 64^2 of the second scales; counted."""
    model = replace(
        MODEL,
        hidden=4096,
        num_layers=1,
        attention=replace(MODEL.attention, num_heads=32, num_kv_heads=8, head_dim=128),
        feed_forward=replace(MODEL.feed_forward, size=11_008),
    )
    with jax.sharding.use_abstract_mesh(Mesh(fsdp=1).abstract(1)):
        _, shapes = abstract(with_code(code, model), training_layout())
        _, whole = abstract(model, training_layout())
    kept = [
        (path, leaf)
        for path, leaf in traverse_util.flatten_dict(shapes).items()
        if "weight" in path and "adapter" not in path
    ]
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in kept)
    numbers = sum(
        math.prod(leaf.shape)
        for path, leaf in traverse_util.flatten_dict(whole).items()
        if path[-1] == "weight" and "adapter" not in path
    )
    assert numbers == 4096 * (2 * 4096 + 2 * 1024 + 3 * 11_008)
    extra = 4096 / 64 * 32 / 4096 / 4096 * 8 if code == NF4() else 0
    np.testing.assert_allclose(8 * size / numbers, bits, rtol=2e-3)
    assert 8 * size / numbers < bits + extra + 1e-2


def test_any_mesh_gives_the_same_gradients_of_adapters():
    """To 1e-5 of the largest; the base has none, and lies cut over the mesh."""
    found = []
    for sizes in ({"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = Mesh(**sizes).build(jax.devices()[: math.prod(sizes.values())])
        with jax.set_mesh(mesh):
            params, config, _ = with_codes(NF4(block=8))
            shapes = abstract(config, training_layout())[1]
            jax.tree.map(lambda a, b: _alike(a, b), params, shapes)
            parts = traverse_util.flatten_dict(params)
            trained = {path: leaf for path, leaf in parts.items() if "adapter" in path}
            rest = {path: leaf for path, leaf in parts.items() if path not in trained}
            loss = loss_of(config)

            @jax.jit
            @jax.grad
            def gradient(trained, rest, batch, loss=loss):
                return loss(traverse_util.unflatten_dict(trained | rest), batch)

            found.append(jax.device_get(gradient(trained, rest, plain_batch(TOKENS))))
    scale = max(np.abs(leaf).max() for leaf in found[0].values())
    assert scale > 0
    for path, leaf in found[0].items():
        np.testing.assert_allclose(found[1][path], leaf, rtol=0, atol=1e-5 * scale)


def _alike(array, shape):
    assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    assert array.sharding.spec == shape.sharding.spec


def test_both_stacks_of_an_encoder_and_a_decoder_have_bases():
    """Those of an encoder and a decoder, in both stacks."""
    fields = {name: getattr(MODEL, name) for name in ("vocab_size", "hidden", "num_layers")}
    both = EncoderDecoderConfig(
        **fields,
        encoder_layers=1,
        max_length=None,
        attention=replace(MODEL.attention, positions=None),
        feed_forward=MODEL.feed_forward,
        positions=None,
        lora=MODEL.lora,
    )
    params, config, _ = with_codes(NF4(), both)
    kept = [path for path in flat(params) if path.endswith("weight.codes")]
    assert any(path.startswith("encoder.blocks.") for path in kept)
    assert any("cross_attention" in path for path in kept)
    batch = plain_batch(TOKENS)
    batch = dataclasses.replace(batch, encoder=batch)
    value = jax.jit(loss_of(config))(params, batch)
    as_float, without = with_base(params, config, None)
    np.testing.assert_allclose(value, jax.jit(loss_of(without))(as_float, batch), rtol=1e-5)


def test_a_block_of_one_number_is_refused():
    with pytest.raises(UserError, match=r"block=1: must be 2 or more"):
        NF4(block=1)
