"""The Fisher information against closed forms, and the optimum that the penalty has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.jobs.fisher import check_targets
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TextHeadConfig,
    TokenHeadConfig,
    TransformerConfig,
    initialize,
)
from lmjax.models.batch import Batch
from lmjax.models.initializers import Normal
from lmjax.objectives import (
    Classification,
    ElasticWeights,
    Example,
    LabelTargets,
    Objective,
    Regression,
    Sums,
    TextLabels,
    TokenLabels,
    TokenTargets,
    diagonal_fisher,
    quadratic_penalty,
    sampled_loss,
)
from lmjax.objectives.elastic_weights import sampled_class_loss
from lmjax.objectives.extended import ExtendedObjective
from lmjax.parallel import training_layout


def test_the_penalty_leaves_nothing_of_its_objective_out():
    """Whatever an objective may say, the one with the penalty passes on; its loss is its own."""
    said = {name for name in vars(Objective) if not name.startswith("_")}
    passed_on = vars(ExtendedObjective).keys() | vars(ElasticWeights).keys()
    assert said - passed_on == {"loss_of_hidden"}


def softmax_loss(logits, example, key):
    """Of labels drawn from softmax(logits), one a row of the example."""
    rows = len(example)
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits), shape=(rows,))
    nll = -jax.nn.log_softmax(logits)[drawn]
    return Sums(jnp.sum(nll), jnp.asarray(rows, jnp.float32), {})


@pytest.mark.parametrize("rows", [1, 8])
def test_the_fisher_of_a_softmax(rows):
    """p (1 - p) for each logit, from single rows and from sums over whole batches."""
    logits, steps = jnp.asarray([0.5, -1.0, 1.5, 0.0]), 20_000
    examples = jnp.zeros((steps, rows))
    found = jax.jit(functools.partial(diagonal_fisher, softmax_loss))(
        logits, examples, jax.random.key(0)
    )
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    # Each step's square deviates by about its own size: 5 standard errors of the mean.
    np.testing.assert_allclose(found, p * (1 - p), rtol=0, atol=5 * 0.4 / np.sqrt(steps))


def test_labels_of_the_data_would_give_another_matrix():
    """Where the model is certain, gradients of drawn labels are small; those of others are not."""
    logits = jnp.asarray([9.0, 0.0])
    found = diagonal_fisher(softmax_loss, logits, jnp.zeros((64, 1)), jax.random.key(0))
    wrong = jax.grad(lambda z: -jax.nn.log_softmax(z)[1])(logits) ** 2
    assert (np.asarray(found) < 0.05).all() and (np.asarray(wrong) > 0.9).all()


def test_the_penalised_optimum_of_a_quadratic():
    """Old task at a, new task (x - b)^T H (x - b) / 2: x = (H b + s F a) / (H + s F)."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 5))
    h, f = random.random((2, 5)) + 0.1
    for strength in (0.1, 3.0, 100.0):
        expected = (h * b + strength * f * a) / (h + strength * f)

        def loss(x, strength=strength):
            parts = [{"x": jnp.asarray(part, jnp.float32)} for part in (a, f)]
            new = jnp.sum(h * jnp.square(x - b)) / 2
            return new + strength * quadratic_penalty({"x": x}, *parts)

        x = jnp.zeros(5)
        slope, curvature = jax.grad(loss), jax.jit(jax.hessian(loss))
        for _ in range(2):  # Newton's method is there after one step
            x = x - jnp.linalg.solve(curvature(x), slope(x))
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


MODEL = TransformerConfig(
    vocab_size=7,
    hidden=8,
    num_layers=1,
    max_length=8,
    attention=AttentionConfig(num_heads=1, head_dim=8),
    feed_forward=FeedForwardConfig(size=8),
    tied_head=False,
    initializer=Normal(std=0.5),
    dropout=0.5,
)


def test_labels_of_a_model_are_drawn_from_its_predictions(one_device):
    """The Fisher of one token's distribution, enumerated: mean over words of gradients squared."""
    graph, params = nnx.split(MODEL.build(training_layout(), nnx.Rngs(0)))
    batch = Batch(*(jnp.asarray(a)[None] for a in ([1, 2, 3], [0, 1, 2], [1, 1, 1])))
    weights = jnp.asarray([[0.0, 0.0, 1.0]])
    example = Example(batch, TokenTargets(jnp.zeros((1, 3), jnp.int32), weights))

    def log_probs(params):
        model = nnx.merge(graph, params)
        return jax.nn.log_softmax(model.logits(model(batch)[0]))[0, 2, :7]

    p = np.exp(np.asarray(jax.jit(log_probs)(params)))
    slopes = jax.device_get(jax.jit(jax.jacrev(log_probs))(params))
    expected = jax.tree.map(lambda s: np.einsum("w,w...->...", p, s**2), slopes)

    def loss(params, example, key):
        return sampled_loss(nnx.merge(graph, params), example, key)

    steps = 3000
    examples = jax.tree.map(lambda a: jnp.broadcast_to(a, (steps, *a.shape)), example)
    found = jax.jit(functools.partial(diagonal_fisher, loss))(params, examples, jax.random.key(1))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(np.asarray(other)).max()
        # Squares whose largest, by a word of probability p, is 1 / p of the mean.
        np.testing.assert_allclose(one, other, rtol=0, atol=0.15 * scale + 1e-6)


@pytest.mark.parametrize("name", ["label", "tag"])
def test_classes_of_a_model_are_drawn_from_its_predictions(name, one_device):
    """p (1 - p) of each bias of the head, of a text's class and of a word's; 5 standard errors."""
    heads = TextHeadConfig(name="label", outputs=3), TokenHeadConfig(name="tag", outputs=3)
    graph, params = initialize(replace(MODEL, heads=heads), training_layout(), jax.random.key(0))
    batch = Batch(*(jnp.asarray(a)[None] for a in ([1, 2, 3], [0, 1, 2], [1, 1, 1])))
    objective, shape = TextLabels(objective=Classification(label_smoothing=0.1)), (1, 1)
    if name == "tag":
        objective, shape = TokenLabels(objectives=(Classification(head="tag"),)), (1, 3)
    last = LabelTargets(jnp.zeros(shape, jnp.int32), jnp.zeros(shape).at[0, -1].set(1.0))
    example = Example(batch, last if name == "label" else (last,))
    check_targets(example, objective)

    def with_bias(bias):
        layer = params["heads"][name]["outputs"] | {"bias": bias}
        return nnx.merge(graph, params | {"heads": params["heads"] | {name: {"outputs": layer}}})

    def loss(bias, example, key):
        return sampled_class_loss(objective, with_bias(bias), example, key)

    bias, steps = jnp.asarray([0.5, -1.0, 1.0]), 3000
    examples = jax.tree.map(lambda a: jnp.broadcast_to(a, (steps, *a.shape)), example)
    found = jax.jit(functools.partial(diagonal_fisher, loss))(bias, examples, jax.random.key(1))

    @jax.jit
    def chances(bias):
        model = with_bias(bias)
        return jax.nn.softmax(model.outputs(name, model(batch)[0], batch)[0, -1])

    p = np.asarray(chances(bias))
    np.testing.assert_allclose(found, p * (1 - p), rtol=0, atol=5 * 0.4 / np.sqrt(steps))


def test_numbers_are_drawn_from_no_prediction():
    with pytest.raises(UserError, match="TextLabels predicts neither tokens nor classes"):
        check_targets(Example(None, None), TextLabels(objective=Regression()))
