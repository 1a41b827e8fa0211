"""The learner: which parameters it trains, models it only reads, and sums of objectives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P

from lmjax.config import UserError, config
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, abstract
from lmjax.objectives import CausalLM, Objective, PrefixLM, Sums, WeightedSum
from lmjax.objectives.lexicon import SHAPES_ONLY
from lmjax.objectives.weighted_sum import join_examples
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW, Muon
from lmjax.training.placement import to_devices
from lmjax.training.trained_part import TrainedPart

MODEL = TransformerConfig(
    vocab_size=97,
    hidden=16,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(Mesh(fsdp=2).build(jax.devices()[:2])) as mesh:
        yield mesh


def learner_of(objective, **settings):
    return Learner(MODEL, objective, AdamW(), lambda step: 1e-2, training_layout(), **settings)


def rows(seed, objective=None, count=8):
    """An example of packed random rows."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 97, (count, 17)).astype(np.int32)
    segments = 1 + np.cumsum(generator.random((count, 17)) < 0.2, axis=1).astype(np.int32)
    seeds = np.arange(count).astype(np.uint64)
    return (objective or CausalLM()).prepare(tokens, segments, seeds, SHAPES_ONLY, 16)


def on_devices(example):
    return to_devices(example, training_layout(), MODEL.vocab_size)


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


def assert_near(found, expected):
    """1e-6 of the largest gradient: sums in another order, where the bias of keys has 0."""
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * scale)


def test_only_what_is_trainable_is_trained():
    """The first step of AdamW without clipping is the same for a parameter, whoever else trains."""
    example = on_devices(rows(0))
    start = learner_of(CausalLM()).init(seed=0)
    states = {}
    for name, trains in {"all": None, "some": lambda path: "attention" in path}.items():
        learner = learner_of(CausalLM(), trained=TrainedPart(trains), clip=None, zero=1)
        state = learner.init(0, jax.tree.map(jnp.copy, start.params))
        states[name], _ = learner.compiled_step(state, example)
    before, after, everything = (
        flat(state.params) for state in (start, states["some"], states["all"])
    )
    assert any("attention" in path for path in before)
    for path, value in before.items():
        if "attention" in path:
            np.testing.assert_allclose(after[path], everything[path], rtol=1e-6, atol=1e-7)
            assert not np.array_equal(after[path], value)
        else:
            np.testing.assert_array_equal(after[path], value)
    held = jax.tree.leaves(states["some"].optimizer)
    assert len(held) < len(jax.tree.leaves(states["all"].optimizer))


def test_state_shapes_are_those_of_a_state():
    trained = TrainedPart(lambda path: "norm" in path)
    learner = learner_of(CausalLM(), trained=trained, average_decay=0.9)
    shapes, state = learner.abstract(), learner.init(seed=1)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


@config
class Imitation(Objective):
    """Mean squared distance to a teacher's hidden states."""

    def loss(self, model, example, key, frozen=None):
        """Sums over tokens."""
        student, teacher = (
            m(example.inputs, key=None)[0].astype(jnp.float32) for m in (model, frozen["teacher"])
        )
        weights = example.targets.weights
        distance = jnp.sum(jnp.square(student - teacher), axis=2)
        return Sums(jnp.sum(weights * distance), jnp.sum(weights), {})


def test_a_frozen_model_is_read_and_not_trained():
    """The gradient is that of a teacher closed over, also in microbatches; of itself it is 0."""
    graph, _ = abstract(MODEL, training_layout())
    learner = learner_of(Imitation(), frozen={"teacher": graph}, microbatch=4)
    state, teacher = learner.init(seed=0), learner.init(seed=1).params
    example = on_devices(rows(0))
    gradients = jax.jit(lambda s, e, f: learner.gradients(s, e, s.key, f))
    found, sums = gradients(state, example, {"teacher": teacher})

    def closed_over(params):
        models = {"teacher": nnx.merge(graph, teacher)}
        return Imitation().loss(nnx.merge(graph, params), example, None, models).loss

    loss, expected = jax.jit(jax.value_and_grad(closed_over))(state.params)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-6)
    assert_near(found, expected)
    itself, sums = gradients(state, example, {"teacher": state.params})
    assert sums.loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(itself))


TERMS = CausalLM(z_loss=1e-2), PrefixLM()
WEIGHTS = 1.0, 3.5


def test_a_weighted_sum_is_the_sum_of_the_means():
    """In microbatches, against gradients of the whole sum.

    The terms have different numbers of targets in every row.
    """
    terms = [rows(0, TERMS[0]), rows(1, TERMS[1])]
    total = WeightedSum(objectives=TERMS, weights=WEIGHTS)
    example = on_devices(join_examples(terms))
    state = learner_of(total).init(seed=0)
    graph = learner_of(total).graph

    def whole(params):
        model, loss = nnx.merge(graph, params), 0.0
        for weight, objective, term in zip(WEIGHTS, TERMS, map(on_devices, terms), strict=True):
            sums = objective.loss(model, term, None)
            loss += weight * sums.loss / sums.weight
        return loss

    loss, expected = jax.jit(jax.value_and_grad(whole))(state.params)
    learner = learner_of(total, microbatch=4)
    found, sums = jax.jit(lambda s, e: learner.gradients(s, e, s.key))(state, example)
    np.testing.assert_allclose(sums.loss / sums.weight, loss, rtol=1e-6)
    assert sums.weight == sum(term.targets.weights.sum() for term in terms)
    found, sums = jax.device_get((found, sums))
    assert_near(jax.tree.map(lambda g: g / sums.weight, found), expected)
    means = [float(sums.extra[name] / sums.weight) for name in ("loss_1", "loss_2")]
    assert np.dot(WEIGHTS, means) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("empty", [0, 1])
def test_a_term_without_targets_takes_nothing_from_the_others(empty):
    terms = [rows(0), rows(1)]
    nothing = dataclasses.replace(terms[empty].targets, weights=np.zeros((8, 16), np.float32))
    terms[empty] = dataclasses.replace(terms[empty], targets=nothing)
    total = WeightedSum(objectives=(CausalLM(), CausalLM()), weights=(2.0, 5.0))
    learner = learner_of(total)
    params = learner.init(seed=0).params
    sums = learner.evaluate(params, on_devices(join_examples(terms)))
    other = learner_of(CausalLM()).evaluate(params, on_devices(terms[1 - empty]))
    mean = total.weights[1 - empty] * other.loss / other.weight
    assert float(sums.loss / sums.weight) == pytest.approx(float(mean), rel=1e-6)
    assert sums.extra[f"loss_{1 + empty}"] == 0


def test_a_sum_makes_the_examples_of_its_terms():
    total = WeightedSum(objectives=TERMS, weights=WEIGHTS)
    example = rows(3, total)
    for number, objective in enumerate(TERMS):
        own = rows(3, objective)
        part = example.inputs[number], example.targets[number]
        for one, other in zip(
            *map(jax.tree.leaves, (part, (own.inputs, own.targets))), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_sums_that_cannot_be_meant():
    with pytest.raises(UserError, match="there are 2 objectives and 1 weights"):
        WeightedSum(objectives=TERMS, weights=(1.0,))
    with pytest.raises(UserError, match="must be above 0"):
        WeightedSum(objectives=TERMS, weights=(1.0, 0.0))
    mixed = WeightedSum(objectives=(CausalLM(), Imitation()), weights=(1.0, 1.0))
    with pytest.raises(UserError, match="Imitation makes no examples from text"):
        mixed.row_length(16)


@pytest.mark.parametrize(("optimizer", "zero"), [(AdamW(), 3), (Muon(), 1)], ids=["adamw", "muon"])
def test_zeros_of_a_pruned_model_are_kept(optimizer, zero):
    """Half of the weights of blocks: after three steps just these are zero, and all others move,
    biases that begin at zero too."""
    how = lambda step: 1e-2, training_layout()
    learner = Learner(MODEL, CausalLM(), optimizer, *how, zero=zero, keep_zeros=True)
    params = learner.init(seed=0).params

    def prune(path, leaf):
        names = [key.key for key in path]
        if names[0] != "blocks" or names[-1] != "weight":
            return leaf
        return jnp.where(jnp.abs(leaf) < jnp.median(jnp.abs(jax.reshard(leaf, P()))), 0, leaf)

    start = jax.tree.map_with_path(prune, params)
    before = flat(start)
    state = learner.init(0, start)
    for seed in range(3):
        state, _ = learner.compiled_step(state, on_devices(rows(seed)))
    after = flat(state.params)
    for path, leaf in before.items():
        if path.startswith("blocks") and path.endswith("weight"):
            np.testing.assert_array_equal(after[path] == 0, leaf == 0)
            assert np.mean(leaf == 0) > 0.4
        else:
            assert (after[path] != leaf).mean() > 0.5
