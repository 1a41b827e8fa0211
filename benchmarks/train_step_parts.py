"""The operations that lmjax's training step is made of, each compiled by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lmjax.objectives import Example
from lmjax.training.learner import Learner
from lmjax.training.optimizers import clip_by_global_norm
from lmjax.training.state import TrainState
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import cross_entropy

Parts = dict[str, tuple[Callable[[], Any], int]]


def lmjax_parts(learner: Learner, state: TrainState, example: Example) -> Parts:
    """For each operation a function that runs it, forward and backward, and its number a step."""
    config, graph, batch = learner.model, learner.graph, example.inputs
    params = jax.tree.map(jnp.copy, state.params)  # the step donates its own
    model = nnx.merge(graph, params)
    block_graph, stacked = nnx.split(model.blocks)
    block = nnx.merge(block_graph, jax.tree.map(lambda a: a[0], stacked))
    keys = iter(jax.random.split(jax.random.key(1), 8))
    rows, length = batch.tokens.shape
    x = jax.random.normal(next(keys), (rows, length, config.hidden))
    heads = config.attention
    of_heads = (rows, length, heads.num_heads, heads.head_dim)
    query, key, value, attended = (jax.random.normal(next(keys), of_heads) for _ in range(4))
    mask = batch.mask(causal=True)
    names = ("query", "key", "value", "output")
    linear = {name: nnx.split(getattr(block.attention, name)) for name in names}

    def project(weights, x, attended):
        def apply(name, inputs):
            return nnx.merge(linear[name][0], weights[name])(inputs)

        return [apply(name, x) for name in names[:3]] + [apply("output", attended)]

    def attend(query, key, value):
        return attention(query, key, value, mask, implementation=heads.implementation)

    def embed(tables):
        return nnx.merge(graph, {**params, **tables}).embed(batch)

    def loss(hidden, table):
        nll, _ = cross_entropy(hidden, table, targets.tokens, vocabulary=config.vocab_size)
        return jnp.sum(nll * targets.weights)

    layers, targets = config.num_layers, example.targets
    tables = {name: params[name] for name in ("embedding", "positions")}
    return {
        "attention": (there_and_back(attend, query, key, value), layers),
        "projections": (
            there_and_back(project, {name: linear[name][1] for name in names}, x, attended),
            layers,
        ),
        "feed_forward": (there_and_back(*_called(block.feed_forward), x), layers),
        "norm": (there_and_back(*_called(block.attention_norm), x), 2 * layers + 1),
        "embedding": (there_and_back(embed, tables), 1),
        "head_and_loss": (there_and_back(loss, x, model.head_table()), 1),
        "optimizer": (_update(learner.transform, params), 1),
    }


def there_and_back(function: Callable, *inputs: Any) -> Callable[[], Any]:
    """Runs the function and its gradient with respect to all inputs."""
    out = jax.eval_shape(function, *inputs)
    cotangents = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), out)

    @jax.jit
    def both(inputs, cotangents):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangents)

    return lambda: both(inputs, cotangents)


def _called(module: nnx.Module) -> tuple[Callable, Any]:
    """A module as a function of its weights and its input, and the weights."""
    graph, weights = nnx.split(module)
    return lambda weights, x: nnx.merge(graph, weights)(x), weights


def _update(transform: optax.GradientTransformation, params: dict) -> Callable[[], Any]:
    """Clipping and the optimizer, on gradients of the parameters' shapes."""
    gradients = jax.tree.map(lambda a: jnp.full(a.shape, 1e-3, a.dtype), params)
    held = {"now": (jax.tree.map(jnp.copy, params), jax.jit(transform.init)(params))}

    def update(params_and_state, gradients):
        params, state = params_and_state
        gradients, _ = clip_by_global_norm(gradients, 1.0)
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=0)

    def run():
        held["now"] = compiled(held["now"], gradients)
        return held["now"]

    return run
