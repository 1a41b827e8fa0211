"""Objectives on labels beside their formulas; several at once; microbatches and meshes."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, config, replace
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    SpanHeadConfig,
    TextHeadConfig,
    TokenHeadConfig,
    Transformer,
    TransformerConfig,
    plain_batch,
)
from lmjax.objectives import (
    CausalLM,
    Classification,
    Example,
    LabelTargets,
    MultiLabelClassification,
    Objective,
    Regression,
    SpanExtraction,
    SpanTargets,
    TokenTargets,
    WeightedSum,
)
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

LENGTH, ROWS, TEXTS = 12, 8, 3
HEADS = (
    TextHeadConfig(name="topic", outputs=3, pooler=True, token="first"),
    TextHeadConfig(name="several", outputs=4, problem="multi_label_classification"),
    TextHeadConfig(name="grade", outputs=2, problem="regression"),
    TokenHeadConfig(name="tag", outputs=5),
    SpanHeadConfig(name="answer"),
)
MODEL = TransformerConfig(
    vocab_size=31,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    heads=HEADS,
)
OBJECTIVES = (
    Classification(head="topic", label_smoothing=0.1),
    MultiLabelClassification(head="several"),
    Regression(head="grade"),
    Classification(head="tag"),
    SpanExtraction(head="answer"),
    CausalLM(),
)
WEIGHTS = (1.0, 0.5, 2.0, 1.5, 3.0, 0.25)


def batch_of(draw):
    """Rows of one to three texts of one to four tokens, and padding behind them."""
    sizes = draw.integers(1, 5, (ROWS, TEXTS))
    counts = draw.integers(1, TEXTS + 1, ROWS)
    segments = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        ids = np.repeat(np.arange(counts[row]) + 1, sizes[row, : counts[row]])
        segments[row, : len(ids)] = ids
    batch = plain_batch(draw.integers(0, 31, (ROWS, LENGTH)).astype(np.int32))
    return dataclasses.replace(batch, segments=segments), counts


def example_of(seed):
    """One batch, and the targets of every objective; some of the labels do not count."""
    draw = np.random.default_rng(seed)
    batch, counts = batch_of(draw)
    there = np.arange(TEXTS) < counts[:, None]
    weights = (there * draw.integers(0, 3, (ROWS, TEXTS))).astype(np.float32)
    weights[0, 0] = 2
    tokens = ((batch.segments > 0) * draw.integers(0, 2, (ROWS, LENGTH))).astype(np.float32)
    starts, ends = np.zeros((2, ROWS, TEXTS), np.int32)
    for row, text in np.argwhere(there):
        own = np.flatnonzero(batch.segments[row] == text + 1)
        starts[row, text], ends[row, text] = np.sort(draw.choice(own, 2))
    targets = (
        LabelTargets(draw.integers(0, 3, (ROWS, TEXTS)).astype(np.int32), weights),
        LabelTargets(draw.integers(0, 2, (ROWS, TEXTS, 4)).astype(np.float32), weights),
        LabelTargets(draw.normal(size=(ROWS, TEXTS, 2)).astype(np.float32), weights),
        LabelTargets(draw.integers(0, 5, (ROWS, LENGTH)).astype(np.int32), tokens),
        SpanTargets(starts, ends, weights),
        TokenTargets(draw.integers(0, 31, (ROWS, LENGTH)).astype(np.int32), tokens),
    )
    return Example(batch, targets)


def learner_of(objective, model=MODEL, **settings):
    rate = lambda step: 1e-2  # noqa: E731
    return Learner(model, objective, AdamW(), rate, training_layout(), **settings)


@functools.cache
def start():
    """Parameters on one device, on the host; every number of the heads is drawn."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        params = jax.device_get(learner_of(CausalLM()).init(seed=0).params)
    draw = np.random.default_rng(0)
    heads = jax.tree.map(lambda a: draw.normal(size=a.shape).astype(a.dtype), params["heads"])
    return params | {"heads": heads}


def numbers(value):
    return jax.tree.map(np.asarray, value)


@functools.cache
def outputs():
    """Outputs of every head, and of the words, for example 0."""
    learner, example = learner_of(CausalLM()), example_of(0)

    @jax.jit
    def run(params, batch):
        model = nnx.merge(learner.graph, params)
        hidden, _ = model(batch)
        found = {head.name: model.outputs(head.name, hidden, batch, TEXTS) for head in HEADS}
        return found | {"words": model.logits(hidden)[..., :31]}

    return {k: np.asarray(v, np.float64) for k, v in run(start(), example.inputs).items()}


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def expected_losses(number, outputs, targets, segments):
    """Loss of each row of outputs, one by one, and whether it is right; None: no such measure."""
    head = (*(head.name for head in HEADS), "words")[number]
    for row, column in np.argwhere(targets.weights):
        x = outputs[head][row] if head == "answer" else outputs[head][row, column]
        if head == "answer":
            own = np.flatnonzero(segments[row] == column + 1)
            ends = targets.starts[row, column], targets.ends[row, column]
            chosen = [log_softmax(x[own, e])[list(own).index(ends[e])] for e in (0, 1)]
            best = tuple(own[np.argmax(x[own, e])] for e in (0, 1))
            yield row, column, -sum(chosen) / 2, best == ends
            continue
        label = (targets.tokens if head == "words" else targets.labels)[row, column]
        if head == "several":
            odds = 1 / (1 + np.exp(-x))
            loss = -np.mean(np.log(np.where(label == 1, odds, 1 - odds)))
            yield row, column, loss, all((x > 0) == (label == 1))
        elif head == "grade":
            yield row, column, np.mean((x - label) ** 2), None
        else:
            share = OBJECTIVES[number].label_smoothing if head == "topic" else 0.0
            wanted = np.full(len(x), share / len(x))
            wanted[label] += 1 - share
            yield row, column, -np.sum(wanted * log_softmax(x)), np.argmax(x) == label


@pytest.mark.parametrize("number", range(len(OBJECTIVES)))
def test_the_loss_is_that_of_the_formula(one_device, number):
    """A loop over labels in float64; 1e-5 of float32 sums."""
    example = example_of(0)
    targets, weights = example.targets[number], example.targets[number].weights
    learner = learner_of(OBJECTIVES[number])
    sums = numbers(jax.jit(learner.evaluate)(start(), Example(example.inputs, targets)))
    loss, right = 0.0, 0.0
    for row, column, own, is_right in expected_losses(
        number, outputs(), targets, example.inputs.segments
    ):
        loss += weights[row, column] * own
        right += weights[row, column] * bool(is_right)
    assert float(sums.weight) == weights.sum() > 0
    assert float(sums.loss) == pytest.approx(loss, rel=1e-5)
    if number not in (2, 5):
        assert float(sums.extra["accuracy"]) == right
    if number == 2:
        errors = np.abs(outputs()["grade"] - targets.labels).mean(axis=-1)
        expected = np.sum(errors * weights)
        assert float(sums.extra["absolute_error"]) == pytest.approx(expected, rel=1e-5)


def test_several_heads_share_one_forward_pass(one_device, monkeypatch):
    """The sum of the means, as with the inputs handed to each; the model runs once."""
    example, total = example_of(0), WeightedSum(objectives=OBJECTIVES, weights=WEIGHTS)
    learner = learner_of(total)
    shared = numbers(jax.jit(learner.evaluate)(start(), example))
    apart = Example((example.inputs,) * len(OBJECTIVES), example.targets)
    alone = numbers(jax.jit(learner.evaluate)(start(), apart))
    # 1e-6: the same sums, compiled in another program.
    for one, other in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    means = []
    for number, (objective, weight) in enumerate(zip(OBJECTIVES, WEIGHTS)):
        own = Example(example.inputs, example.targets[number])
        sums = numbers(jax.jit(learner_of(objective).evaluate)(start(), own))
        means.append(weight * float(sums.loss / sums.weight))
        if "accuracy" in sums.extra:
            found = shared.extra[f"accuracy_{number + 1}"] / shared.weight
            assert float(found) == pytest.approx(float(sums.extra["accuracy"] / sums.weight))
    assert float(shared.loss / shared.weight) == pytest.approx(sum(means), rel=1e-6)
    runs, run = [], Transformer.run
    monkeypatch.setattr(Transformer, "run", lambda *args: runs.append(1) or run(*args))
    for inputs, times in ((example.inputs, 1), (apart.inputs, len(OBJECTIVES))):
        runs.clear()
        # A learner of its own, which has not been traced.
        jax.eval_shape(learner_of(total).evaluate, start(), Example(inputs, example.targets))
        assert len(runs) == times


def gradients(mesh, devices, microbatch=None):
    """Gradients of the sum over all objectives, on a mesh."""
    total = WeightedSum(objectives=OBJECTIVES, weights=WEIGHTS)
    with jax.set_mesh(mesh.build(jax.devices()[:devices])):
        learner = learner_of(total, microbatch=microbatch)
        shapes = learner.abstract()
        put = lambda a, s: jax.device_put(a, s.sharding.spec)  # noqa: E731
        params = jax.tree.map(put, start(), shapes.params)
        state = dataclasses.replace(learner.init(seed=0), params=params)
        example = to_devices(example_of(0), training_layout(), MODEL.vocab_size)
        found, sums = jax.jit(lambda s, e: learner.gradients(s, e, s.key))(state, example)
        return jax.device_get((found, sums))


@functools.cache
def gradients_of_one_device():
    return gradients(Mesh(fsdp=1), 1)


def test_microbatches_and_meshes_give_the_same_gradients():
    """2e-6 of the largest gradient: sums in another order."""
    expected, whole = gradients_of_one_device()
    found, sums = gradients(Mesh(fsdp=2, tensor=2, context=2), 8, 4)
    for one, other in zip(jax.tree.leaves(sums), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_loud(one_device, label):
    """Where it counts; without weight it changes nothing."""
    example, objective = example_of(0), OBJECTIVES[0]
    run = jax.jit(learner_of(objective).evaluate)
    targets, plain = example.targets[0], run(start(), Example(example.inputs, example.targets[0]))
    for weight in (0.0, 1.0):
        labels, weights = targets.labels.copy(), targets.weights.copy()
        row, column = np.argwhere(weights == 0)[0]
        labels[row, column], weights[row, column] = label, weight
        found = run(start(), Example(example.inputs, LabelTargets(labels, weights)))
        assert np.isnan(found.loss) if weight else found.loss == plain.loss


def test_a_span_outside_of_its_text_is_loud(one_device):
    example = example_of(0)
    targets = example.targets[4]
    outside = dataclasses.replace(targets, ends=np.full_like(targets.ends, LENGTH - 1))
    segments = example.inputs.segments.copy()
    segments[:, -1] = 0
    inputs = dataclasses.replace(example.inputs, segments=segments)
    sums = jax.jit(learner_of(OBJECTIVES[4]).evaluate)(start(), Example(inputs, outside))
    assert not np.isfinite(sums.loss)


def test_language_modelling_as_an_auxiliary_objective_learns_both(one_device):
    """GPT-1's L2 + 0.5 L1 (Radford et al. 2018, section 3.2), on texts of two kinds."""
    model = replace(MODEL, heads=(TextHeadConfig(outputs=2, dropout=0.1),), dropout=0.1)
    total = WeightedSum(objectives=(Classification(), CausalLM()), weights=(1.0, 0.5))
    learner = learner_of(total, model)
    state, metrics = learner.init(seed=0), None
    for step in range(60):
        draw = np.random.default_rng(step)
        labels = draw.integers(0, 2, (ROWS, 1)).astype(np.int32)
        tokens = (draw.integers(0, 15, (ROWS, LENGTH)) + 15 * labels).astype(np.int32)
        every = np.ones((ROWS, LENGTH), np.float32)
        words = TokenTargets(np.roll(tokens, -1, axis=1), every * (np.arange(LENGTH) < LENGTH - 1))
        targets = LabelTargets(labels, np.ones((ROWS, 1), np.float32)), words
        state, metrics = learner.compiled_step(state, Example(plain_batch(tokens), targets))
    assert float(metrics["accuracy_1"]) == 1 and float(metrics["loss_1"]) < 0.1
    assert float(metrics["cross_entropy_2"]) < math.log(31) - 0.3  # half of the words cannot come
    both = metrics["loss_1"] + 0.5 * metrics["loss_2"]
    assert float(metrics["loss"]) == pytest.approx(float(both), rel=1e-5)


@config
class OwnForward(Objective):
    """An objective that runs the model itself."""

    def loss(self, model, example, key, frozen=None):
        raise NotImplementedError


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="'label' that is a TextHead or TokenHead"):
        Classification().check(MODEL)
    with pytest.raises(UserError, match="'topic' that is a SpanHead"):
        SpanExtraction(head="topic").check(MODEL)
    Classification(head="tag").check(MODEL)
    with pytest.raises(UserError, match="label_smoothing=1"):
        Classification(label_smoothing=1.0)


def test_an_objective_that_runs_the_model_itself_shares_nothing(one_device):
    example, total = example_of(0), WeightedSum(objectives=(OwnForward(),), weights=(1.0,))
    shared = Example(example.inputs, example.targets[:1])
    with pytest.raises(UserError, match="OwnForward runs the model itself"):
        jax.eval_shape(learner_of(total).evaluate, start(), shared)
