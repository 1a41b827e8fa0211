"""Shrunk gradients: the same values, and of a tied table only the embedding's share is smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lmjax.config import config, replace
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.models.shrink import shrink_gradient
from lmjax.objectives import CausalLM
from lmjax.parallel import AXES, Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import Optimizer
from lmjax.training.schedules import piecewise_linear
from lmjax.training.state import TrainState

MODEL = TransformerConfig(
    vocab_size=40,
    hidden=16,
    num_layers=1,
    max_length=8,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=16),
)
POINTS = ((4, 0.1), (6, 1.0), (8, 0.5))


def test_values_stay_to_the_bit_and_gradients_are_multiplied():
    x = jax.random.normal(jax.random.key(0), (100,)) * 1e3
    np.testing.assert_array_equal(shrink_gradient(x, 0.1), x)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(shrink_gradient(x, 0.1))))(x)
    np.testing.assert_allclose(gradient, 0.1 * 2 * x, rtol=1e-6)


@config
class Descent(Optimizer):
    """Plain descent of rate 1."""

    def build(self, schedule, params):
        return optax.sgd(1.0)


def example():
    tokens = np.random.default_rng(0).integers(0, 40, (8, 9)).astype(np.int32)
    return CausalLM().prepare(tokens, np.ones_like(tokens), np.zeros(8, np.uint64))


@pytest.fixture(scope="module")
def shares():
    """Gradients of the mean loss of a model without the shrink whose head is a table of its own.

    Both tables hold the same, so that the tied one's gradient is the sum of theirs.
    """
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        layout, key = training_layout(), jax.random.key(0)
        _, params = initialize(MODEL, layout, key)
        graph, _ = initialize(replace(MODEL, tied_head=False), layout, key)

        def loss(params, example):
            sums = CausalLM().loss(nnx.merge(graph, params), example, None)
            return sums.loss / sums.weight

        gradients = jax.jit(jax.grad(loss))(params | {"head": params["embedding"]}, example())
        return jax.tree.map(np.asarray, (params, gradients))


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        (dict(data=2, fsdp=2, tensor=2), {"zero": 3}),
        (dict(data=2, fsdp=2, tensor=2), {"zero": 2, "microbatch": 4}),
    ],
    ids=["mesh", "mesh and parts"],
)
def test_the_step_says_how_much_of_the_embeddings_gradient_is_left(shares, sizes, settings):
    """Plain descent of rate 1 moves each parameter by its gradient: head + factor x embedding."""
    before, whole = shares
    embedding, head = whole["embedding"]["table"], whole["head"]["table"]
    assert np.abs(embedding).max() > 0.01 and np.abs(head).max() > 0.01
    mesh = Mesh(**sizes).build(jax.devices()[: np.prod([sizes.get(axis, 1) for axis in AXES])])
    with jax.set_mesh(mesh):
        layout = training_layout()
        _, params = initialize(MODEL, layout, jax.random.key(0))
        learner = Learner(
            model=MODEL,
            objective=CausalLM(),
            optimizer=Descent(),
            rate=lambda step: 1.0,
            layout=layout,
            clip=None,
            embedding_gradient=piecewise_linear(POINTS),
            **settings,
        )
        place = jax.NamedSharding(mesh, layout.spec("batch", "seq"))
        placed, train_step = jax.device_put(example(), place), jax.jit(learner.step)
        for step, factor in {0: 0.1, 4: 0.1, 5: 0.55, 6: 1.0, 7: 0.75, 100: 0.5}.items():
            optimizer = learner.transform.init(params)
            state = TrainState(params, optimizer, None, jnp.int32(step), jax.random.key(0))
            after, _ = train_step(state, placed)
            moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params)
            expected = {**whole, "embedding": {"table": head + factor * embedding}}
            del expected["head"]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved, expected)
