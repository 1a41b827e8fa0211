"""Mixtures of experts against the dense formulation: every expert of every token, most masked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.models import (
    NF4,
    AttentionConfig,
    Batch,
    ExpertChoiceRouter,
    ExpertsConfig,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    LoRA,
    TopKRouter,
    TransformerConfig,
    initialize,
    plain_batch,
)
from lmjax.models.experts import RoutedRows
from lmjax.models.feed_forward import activate
from lmjax.models.initializers import Normal
from lmjax.models.linear import Builder
from lmjax.parallel import training_layout

HIDDEN, SIZE, EXPERTS, ROWS, LENGTH = 16, 24, 4, 2, 12
SMALL = ExpertsConfig(size=SIZE, experts=EXPERTS)
CONFIGS = {
    "dropless": SMALL,
    "switch": replace(SMALL, router=TopKRouter(chosen=1, normalise=False)),
    "three": replace(SMALL, router=TopKRouter(chosen=3, normalise=False)),
    "capacity": replace(SMALL, router=TopKRouter(capacity=0.6)),
    "room for all": replace(SMALL, router=TopKRouter(capacity=4.0)),
    "expert choice": replace(SMALL, router=ExpertChoiceRouter(capacity=1.5)),
    "plain, biased": replace(SMALL, gated=False, bias=True, activation="gelu"),
    "capacity, biased": replace(SMALL, bias=True, router=TopKRouter(capacity=0.6)),
    "shared": replace(SMALL, shared=GatedFeedForwardConfig(size=8)),
}


def made(config, seed=0):
    """The layer's structure and parameters, drawn large enough to matter; biases are not zero."""
    rngs = nnx.Rngs(jax.random.key(seed))
    builder = Builder(HIDDEN, 2, Normal(std=0.5), "float32", training_layout(), rngs)
    graph, state = nnx.split(config.build(builder))

    def draw(path, leaf):
        if "bias" not in jax.tree_util.keystr(path):
            return leaf
        return jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return graph, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))


def activations(seed=2):
    """Activations and which tokens are real: the second row ends in padding."""
    x = jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, HIDDEN))
    real = np.ones((ROWS, LENGTH), bool)
    real[1, 7:] = False
    return x, jnp.asarray(real)


def masks_by_loop(config, probabilities, real):
    """Experts that each token chose, and those that compute it, [rows, seq, experts]."""
    router = config.router
    rows, length, experts = probabilities.shape
    chosen = np.zeros(probabilities.shape, bool)
    kept = chosen.copy()
    for b in range(rows):
        here = [t for t in range(length) if real[b, t]]
        if isinstance(router, ExpertChoiceRouter):
            room = int(np.ceil(router.capacity * length / experts))
            for e in range(experts):
                kept[b, sorted(here, key=lambda t, e=e, b=b: -probabilities[b, t, e])[:room], e] = 1
            continue
        room = length
        if router.capacity is not None:
            room = int(np.ceil(router.chosen * router.capacity * length / experts))
        for choice in range(router.chosen):
            for t in here:
                e = np.argsort(-probabilities[b, t])[choice]
                chosen[b, t, e] = True
                kept[b, t, e] = kept[b, :, e].sum() < room
    return chosen, kept


def dense(config, graph, params, x, masks):
    """Every expert's output for every token, by its weight: nothing is sorted or gathered."""
    layer, (chosen, kept) = nnx.merge(graph, params), masks
    weights = jax.nn.softmax(x @ params["router"]["weight"], axis=2)
    if getattr(config.router, "normalise", False):
        weights = weights / jnp.maximum(jnp.sum(weights * chosen, axis=2, keepdims=True), 1e-9)
    weights = weights * kept
    total = 0.0 if layer.shared is None else layer.shared(x)
    for e in range(config.experts):

        def product(name, x, e=e):
            own = getattr(layer.experts, name)
            bias = 0.0 if own.bias is None else own.bias[...][e]
            return x @ own.weight[...][e] + bias

        hidden = product("up", x)
        if config.gated:
            hidden = activate(config.activation, product("gate", x)) * hidden
        else:
            hidden = activate(config.activation, hidden)
        total = total + weights[..., e : e + 1] * product("down", hidden)
    return total


def routed(graph, params, x, real, **facts):
    return nnx.merge(graph, params)(x, RoutedRows(real, **facts))


def value_and_gradients(function, params, x):
    """Of a sum that weighs all outputs otherwise, by parameters and activations."""

    @jax.jit
    def run(params, x):
        def loss(params, x):
            out = function(params, x)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return out, gradients

    return jax.device_get(run(params, x))


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_the_dense_formulation(one_device, name):
    """1e-6 of the largest number in float32: sums in another order."""
    config = CONFIGS[name]
    graph, params = made(config)
    x, real = activations()
    logits = np.asarray(x) @ np.asarray(params["router"]["weight"])
    masks = masks_by_loop(config, np.asarray(jax.nn.softmax(logits, axis=2)), np.asarray(real))
    found = value_and_gradients(lambda p, x: routed(graph, p, x, real), params, x)
    expected = value_and_gradients(lambda p, x: dense(config, graph, p, x, masks), params, x)

    def check(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())

    jax.tree.map(check, found, expected)


def test_padding_gives_nothing_and_changes_nothing(one_device):
    """Its output is 0, and whatever it contains, all other tokens have theirs, drops included."""
    graph, params = made(CONFIGS["capacity"])
    x, real = activations()
    run = jax.jit(lambda x: routed(graph, params, x, real))
    out, other = run(x), run(jnp.where(real[..., None], x, 100.0))
    assert not out[~real].any()
    np.testing.assert_array_equal(out, other)


def test_all_tokens_of_one_expert(one_device):
    """Without a capacity none is dropped: the output is that of the one expert."""
    config = CONFIGS["switch"]
    graph, params = made(config)
    params["router"]["weight"] = jnp.zeros((HIDDEN, EXPERTS)).at[:, 2].set(100.0)
    x, real = jnp.abs(activations()[0]), jnp.ones((ROWS, LENGTH), bool)
    out = jax.jit(lambda x: routed(graph, params, x, real))(x)
    experts = nnx.merge(graph, params).experts
    up, gate, down = (getattr(experts, name).weight[...][2] for name in ("up", "gate", "down"))
    expected = (jax.nn.silu(x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(out, expected, atol=2e-6 * float(np.abs(expected).max()))


def test_texts_that_are_continued_drop_nothing(one_device):
    """A cache's tokens are computed whatever the capacity, so one by one they give the same."""
    graph, params = made(CONFIGS["capacity"])
    x, real = activations()
    run = jax.jit(lambda x, real: routed(graph, params, x, real, whole=True))
    apart = [run(x[:, t : t + 1], real[:, t : t + 1]) for t in range(LENGTH)]
    np.testing.assert_allclose(jnp.concatenate(apart, axis=1), run(x, real), atol=1e-5)
    free, _ = made(CONFIGS["dropless"])
    every = jax.jit(lambda x, real: routed(free, params, x, real))
    np.testing.assert_array_equal(every(x, real), run(x, real))
    choosing, params = made(CONFIGS["expert choice"])
    with pytest.raises(UserError, match=r"ExpertChoiceRouter: .* cannot continue one"):
        routed(choosing, params, x, real, whole=True)


def test_jitter_moves_the_routers_input_alone(one_device):
    """Within the bounds, in training: logits of a unit matrix are the input itself."""
    config = replace(SMALL, experts=HIDDEN, router=TopKRouter(jitter=0.1))
    graph, params = made(config)
    params["router"]["weight"] = jnp.eye(HIDDEN)
    layer, (x, _) = nnx.merge(graph, params), activations()
    np.testing.assert_array_equal(layer.logits(x, None), x)
    share = np.asarray(layer.logits(x, jax.random.key(0)) / x)
    assert 0.9 <= share.min() < 0.92 and 1.08 < share.max() <= 1.1


MODEL = TransformerConfig(
    vocab_size=61,
    hidden=HIDDEN,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=SMALL,
)


def test_packed_rows_are_as_unpacked_ones(one_device):
    """Two documents in a row, and each in a row of its own: 1e-5, attention sums otherwise."""
    graph, params = initialize(MODEL, training_layout(), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 61, (1, 12)).astype(np.int32)
    packed = Batch(
        tokens=tokens,
        positions=np.array([[*range(7), *range(5)]], np.int32),
        segments=np.array([[1] * 7 + [2] * 5], np.int32),
    )
    run = jax.jit(lambda params, batch: nnx.merge(graph, params)(batch)[0])
    whole = run(params, packed)
    for part in (slice(0, 7), slice(7, 12)):
        np.testing.assert_allclose(
            run(params, plain_batch(tokens[:, part])), whole[:, part], atol=1e-5
        )


def test_parameters_are_named_and_shaped(one_device):
    _, params = initialize(MODEL, training_layout(), jax.random.key(0))
    shapes = jax.tree.map(lambda a: a.shape, params["blocks"]["feed_forward"])
    assert shapes == {
        "router": {"weight": (2, HIDDEN, EXPERTS)},
        "experts": {
            "up": {"weight": (2, EXPERTS, HIDDEN, SIZE)},
            "gate": {"weight": (2, EXPERTS, HIDDEN, SIZE)},
            "down": {"weight": (2, EXPERTS, SIZE, HIDDEN)},
        },
    }


def test_a_dense_layer_becomes_a_mixture_by_its_name():
    """The settings that both have stay: width, activation and biases."""
    assert SMALL.dense == GatedFeedForwardConfig(size=SIZE)
    plain = ExpertsConfig(size=8, gated=False, bias=True, activation="relu").dense
    assert plain == FeedForwardConfig(size=8, activation="relu")


def test_weights_in_few_bits_are_refused():
    with pytest.raises(UserError, match=r"lora.base=NF4: weights of experts are not kept"):
        replace(MODEL, lora=LoRA(base=NF4()))


def test_facts_of_rows_are_data():
    """They go through jax's transformations."""
    rows = RoutedRows(jnp.ones((1, 2), bool), whole=True)
    assert jax.tree.map(lambda a: a, rows).whole and dataclasses.is_dataclass(rows)
