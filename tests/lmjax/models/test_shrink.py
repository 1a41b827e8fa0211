"""Shrunk gradients: the same values, and of a tied table only the embedding's share is smaller."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.config import replace
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.models.shrink import shrink_gradient
from lmjax.objectives import CausalLM
from lmjax.parallel import training_layout


def test_values_stay_to_the_bit_and_gradients_are_multiplied():
    x = jax.random.normal(jax.random.key(0), (100,)) * 1e3
    np.testing.assert_array_equal(shrink_gradient(x, 0.1), x)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(shrink_gradient(x, 0.1))))(x)
    np.testing.assert_allclose(gradient, 0.1 * 2 * x, rtol=1e-6)


def test_the_tied_heads_gradient_stays_whole(one_device):
    """Gradients are linear in the factor: between those of 0, the head's alone, and of 1."""
    config = TransformerConfig(
        vocab_size=40,
        hidden=16,
        num_layers=1,
        max_length=8,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(size=16),
    )
    _, params = initialize(config, training_layout(), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    batch = CausalLM().prepare(tokens, np.ones_like(tokens), np.zeros(2, np.uint64))

    def gradient(factor):
        graph, _ = initialize(
            replace(config, embedding_gradient=factor), training_layout(), jax.random.key(0)
        )

        def loss(params, batch):
            return CausalLM().loss(nnx.merge(graph, params), batch, None).loss

        return jax.jit(jax.grad(loss))(params, batch)

    none, some, whole = map(gradient, (0.0, 0.1, 1.0))
    table = [tree["embedding"]["table"] for tree in (none, some, whole)]
    assert np.abs(table[2] - table[0]).max() > 0.1
    np.testing.assert_allclose(table[1], table[0] + 0.1 * (table[2] - table[0]), atol=1e-5)
    for a, b in zip(jax.tree.leaves(some["blocks"]), jax.tree.leaves(whole["blocks"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums in another order
