"""Mixtures of experts that begin as dense models give what these give."""

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.interop import huggingface
from lmjax.interop.folder import read_params
from lmjax.models import (
    ExpertsConfig,
    GatedFeedForwardConfig,
    TopKRouter,
    abstract,
    gpt2,
    initialize,
    llama,
    plain_batch,
)
from lmjax.models.upcycling import dense_model, upcycled
from lmjax.parallel import Mesh, training_layout

TOKENS = np.random.default_rng(0).integers(0, 61, (4, 12)).astype(np.int32)
EXPERTS = 4


def tiny(config):
    """A small dense model of the config's family."""
    attention = replace(config.attention, num_heads=2, num_kv_heads=2, head_dim=8)
    feed_forward = replace(config.feed_forward, size=24)
    sizes = dict(vocab_size=61, hidden=16, num_layers=2, max_length=16)
    return replace(config, **sizes, attention=attention, feed_forward=feed_forward)


def mixture_of(config, **changes):
    """The model with experts like its feed-forward layer."""
    dense = config.feed_forward
    experts = ExpertsConfig(
        size=dense.size,
        activation=dense.activation,
        bias=dense.bias,
        gated=isinstance(dense, GatedFeedForwardConfig),
        experts=EXPERTS,
        **changes,
    )
    return replace(config, feed_forward=experts)


def logits(config, params):
    graph, _ = abstract(config, training_layout())

    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    sharding = jax.NamedSharding(jax.sharding.get_mesh(), training_layout().spec("batch", "seq"))
    return np.asarray(jax.jit(run)(params, jax.device_put(plain_batch(TOKENS), sharding)))


@pytest.mark.parametrize("family", [llama, gpt2], ids=lambda family: family.__name__)
def test_a_mixture_begins_as_the_dense_model(one_device, family):
    """1e-5 of the largest logit: the weights of equal experts add up to 1. Routers differ."""
    dense = tiny(family())
    mixture = mixture_of(dense)
    assert dense_model(mixture) == dense
    _, params = initialize(dense, training_layout(), jax.random.key(0))
    params = jax.tree.map(  # biases too
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params
    )
    made = upcycled(params, mixture, training_layout(), jax.random.key(1))
    shapes = jax.tree.map(lambda a: a.shape, abstract(mixture, training_layout())[1])
    assert jax.tree.map(lambda a: a.shape, made) == shapes
    expected = logits(dense, params)
    atol = 1e-5 * np.abs(expected[..., :61]).max()
    np.testing.assert_allclose(logits(mixture, made)[..., :61], expected[..., :61], atol=atol)
    up = made["blocks"]["feed_forward"]["experts"]["up"]["weight"]
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(
            up[:, expert], params["blocks"]["feed_forward"]["up"]["weight"]
        )
    first, second = made["blocks"]["feed_forward"]["router"]["weight"]
    assert np.asarray(first).std() > 0 and (first != second).all()


def test_a_dense_folder_becomes_a_mixture_on_a_mesh(tmp_path):
    """As `begin_with` reads it, with the experts and the rest divided over devices."""
    dense = tiny(llama())
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        _, params = initialize(dense, training_layout(), jax.random.key(0))
        huggingface.write(tmp_path, dense, params)
        expected = logits(dense, params)
    with jax.set_mesh(Mesh(fsdp=2, expert=2).build(jax.devices()[:4])):
        mixture = mixture_of(dense, router=TopKRouter(chosen=3))
        made = read_params(tmp_path, mixture, training_layout())
        shapes = abstract(mixture, training_layout())[1]
        specs = jax.tree.map(lambda a: a.sharding.spec, shapes)
        assert jax.tree.map(lambda a: a.sharding.spec, made) == specs
        np.testing.assert_allclose(logits(mixture, made), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_expert_is_refused():
    with pytest.raises(UserError, match=r"feed_forward.shared: .* set it to none"):
        dense_model(mixture_of(tiny(llama()), shared=GatedFeedForwardConfig(size=8)))
