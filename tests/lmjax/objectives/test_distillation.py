"""Distillation against numpy in float64, on one device and on eight, whole and in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from lmjax.config import UserError, replace
from lmjax.models import AttentionConfig, FeedForwardConfig, Normal, TransformerConfig, abstract
from lmjax.models.label_heads import TokenHeadConfig
from lmjax.models.layer_states import layer_states
from lmjax.models.positions import ALiBi, BlockPositions
from lmjax.objectives import (
    BlankInfilling,
    CausalLM,
    Distilled,
    ForwardKL,
    JensenShannon,
    MaskedLM,
    Mixed,
    ReverseKL,
    SkewedKL,
    SkewedReverseKL,
    TextLabels,
    WeightedSum,
    distillation,
)
from lmjax.objectives.distillation import TeacherLoss
from lmjax.objectives.lexicon import SHAPES_ONLY
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

LENGTH, WORDS = 16, 97
STUDENT = TransformerConfig(
    vocab_size=WORDS,
    hidden=16,
    num_layers=2,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    initializer=Normal(std=0.3),
)
TEACHER = replace(STUDENT, hidden=24, num_layers=1, dropout=0.5)
DIVERGENCES = [
    ForwardKL(),
    ReverseKL(),
    SkewedKL(share=0.2),
    SkewedReverseKL(share=0.2),
    JensenShannon(share=0.3),
]


def by_hand(divergence, p, q):
    """The divergence of q, the student, from p in float64 probabilities."""
    kl = lambda a, b: np.sum(a * np.log(a / b), axis=-1)  # noqa: E731
    share = getattr(divergence, "share", None)
    if isinstance(divergence, ForwardKL):
        return kl(p, q)
    if isinstance(divergence, ReverseKL):
        return kl(q, p)
    if isinstance(divergence, SkewedKL):
        return kl(p, share * p + (1 - share) * q)
    if isinstance(divergence, SkewedReverseKL):
        return kl(q, (1 - share) * p + share * q)
    m = share * p + (1 - share) * q
    return share * kl(p, m) + (1 - share) * kl(q, m)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
def test_divergences_are_their_formulas(divergence):
    """To 1e-6 of numbers of about 1; 0 of equals; padding with logits of -1e30 adds nothing."""
    p, q = np.random.default_rng(0).normal(size=(2, 5, 30)) * 2
    p, q = (log_softmax(a, axis=-1) for a in (p, q))
    padded = [np.pad(a, ((0, 0), (0, 2)), constant_values=-1e30) for a in (p, q)]
    found = divergence(*(jnp.asarray(a, jnp.float32) for a in padded))
    np.testing.assert_allclose(found, by_hand(divergence, np.exp(p), np.exp(q)), rtol=0, atol=1e-5)
    same = divergence(*2 * [jnp.asarray(p, jnp.float32)])
    np.testing.assert_allclose(same, 0, rtol=0, atol=1e-6)


def rows(objective, count=8):
    """An example of packed random rows, in numpy."""
    generator = np.random.default_rng(1)
    width = objective.row_length(LENGTH)
    tokens = generator.integers(5, WORDS, (count, width)).astype(np.int32)
    segments = 1 + np.cumsum(generator.random((count, width)) < 0.1, axis=1).astype(np.int32)
    seeds = np.arange(count).astype(np.uint64)
    return objective.prepare(tokens, segments, seeds, SHAPES_ONLY, LENGTH)


def learner_of(objective, teacher_loss, student=STUDENT, teacher=TEACHER, **settings):
    """A learner of a student, and the teacher's parameters."""
    layout = training_layout()
    graph, _ = abstract(teacher, layout)
    own = Distilled(objective=objective, teacher_loss=teacher_loss)
    how = AdamW(), lambda step: 1e-2, layout
    learner = Learner(student, own, *how, frozen={"teacher": graph}, **settings)
    params = Learner(teacher, objective, *how).init(seed=5).params
    return learner, {"teacher": params}


def encoder(model):
    return replace(model, attention=replace(model.attention, causal=False))


def with_blocks(model):
    return replace(model, positions=BlockPositions())


CASES = {
    "causal": (CausalLM(), lambda model: model),
    "masked": (MaskedLM(), encoder),
    "blanks": (
        Mixed(objectives=(BlankInfilling(), BlankInfilling()), weights=(1.0, 1.0)),
        with_blocks,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_both_models_logits(case, one_device, monkeypatch):
    """In parts of 4 places of a row: (1 - w) nats + w T^2 divergence over all targets, to 1e-5."""
    monkeypatch.setattr(distillation, "POSITIONS", 4)
    objective, adapt = CASES[case]
    student, teacher = map(adapt, (STUDENT, TEACHER))
    terms = TeacherLoss(divergence=SkewedKL(), temperature=2.0, weight=0.3)
    learner, frozen = learner_of(objective, terms, student, teacher)
    state = learner.init(seed=0)
    example = to_devices(rows(objective), learner.layout, WORDS)
    sums = jax.jit(learner.evaluate)(state.params, example, frozen)

    def logits(config, params):
        model = nnx.merge(abstract(config, learner.layout)[0], params)
        return model.logits(model(example.inputs)[0])

    given = (
        jax.jit(logits, static_argnums=0)(*both)
        for both in ((teacher, frozen["teacher"]), (student, state.params))
    )
    p, q = (np.asarray(a, np.float64)[..., :WORDS] for a in given)
    weights = np.asarray(example.targets.weights, np.float64)
    nll = -np.take_along_axis(log_softmax(q, -1), np.asarray(example.targets.tokens)[..., None], -1)
    soft = (np.exp(log_softmax(a / 2, axis=-1)) for a in (p, q))
    divergence = np.sum(weights * by_hand(SkewedKL(), *soft))
    nats = np.sum(weights * nll[..., 0])
    assert weights.sum() > 8
    np.testing.assert_allclose(sums.weight, weights.sum())
    np.testing.assert_allclose(sums.extra["cross_entropy"], nats, rtol=1e-5)
    np.testing.assert_allclose(sums.extra["teacher_divergence"], divergence, rtol=1e-5)
    np.testing.assert_allclose(sums.loss, 0.7 * nats + 0.3 * 4 * divergence, rtol=1e-5)


def gradients_on(mesh, devices, **settings):
    """Gradients of the student's parameters, and sums."""
    with jax.set_mesh(mesh.build(jax.devices()[:devices])):
        learner, frozen = learner_of(CausalLM(), TeacherLoss(weight=0.7, attention=1.0), **settings)
        example = to_devices(rows(CausalLM()), learner.layout, WORDS)
        start = learner.init(seed=0)
        found, sums = jax.jit(learner.gradients)(start, example, start.key, frozen)
        state, _ = jax.eval_shape(learner.step, start, example, frozen)
        held = [leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
        shapes = [leaf.shape for leaf in jax.tree.leaves(state.params)]
        assert sorted(held) == sorted(2 * shapes)  # two moments of the student alone
        return jax.device_get((found, sums.extra | {"loss": sums.loss}))


def test_eight_devices_and_microbatches_give_the_gradient_of_one():
    """To 1e-5 of the largest gradient: sums in another order."""
    expected, one = gradients_on(Mesh(fsdp=1), 1)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    found, sums = gradients_on(Mesh(fsdp=2, tensor=2, context=2), 8, microbatch=4, zero=1)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
    for name in ("loss", "cross_entropy", "teacher_divergence", "attention_divergence"):
        np.testing.assert_allclose(sums[name], one[name], rtol=1e-5)


def test_the_gradient_is_that_of_the_formula(one_device):
    """Of the divergence alone, by plain softmax over whole rows, to 1e-5 of the largest."""
    learner, frozen = learner_of(CausalLM(), TeacherLoss(weight=1.0))
    state = learner.init(seed=0)
    example = to_devices(rows(CausalLM()), learner.layout, WORDS)

    def written_out(params):
        models = (
            nnx.merge(learner.graph, params),
            nnx.merge(learner.frozen["teacher"], *frozen.values()),
        )
        q, p = (m.logits(m(example.inputs)[0])[..., :WORDS] for m in models)
        each = jnp.sum(jax.nn.softmax(p) * (jax.nn.log_softmax(p) - jax.nn.log_softmax(q)), axis=-1)
        return jnp.sum(each * example.targets.weights)

    expected = jax.jit(jax.grad(written_out))(state.params)
    found, _ = jax.jit(learner.gradients)(state, example, state.key, frozen)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("mapped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_hidden_states_are_compared_layer_by_layer(mapped, one_device):
    """Two layers with the second and fourth of four, from models cut off there, to 1e-5; of other
    widths by the head "teacher"."""
    wide = 24 if mapped else 16
    heads = (TokenHeadConfig(name="teacher", outputs=wide),) * mapped
    student = replace(STUDENT, heads=heads)
    teacher = replace(STUDENT, hidden=wide, num_layers=4)
    learner, frozen = learner_of(CausalLM(), TeacherLoss(hidden=2.0), student, teacher)
    learner.objective.check_pair(student, teacher)
    state = learner.init(seed=0)
    example = to_devices(rows(CausalLM()), learner.layout, WORDS)
    sums = jax.jit(learner.evaluate)(state.params, example, frozen)

    def states(config, params, layers):
        cut = replace(config, num_layers=layers)
        blocks = jax.tree.map(lambda a: np.asarray(a)[:layers], params["blocks"])
        params = params | {"blocks": blocks}

        @jax.jit
        def run(params, batch):
            model = nnx.merge(abstract(cut, learner.layout)[0], params)
            model.final_norm = None
            found = model(batch)[0]
            return model.outputs("teacher", found, batch) if config.heads else found

        return run(params, example.inputs)

    expected, weights = 0.0, np.asarray(example.targets.weights, np.float64)
    for layers in (1, 2):
        own = np.asarray(states(student, state.params, layers), np.float64)
        other = np.asarray(states(teacher, frozen["teacher"], 2 * layers), np.float64)
        expected += np.sum(weights * np.mean((own - other) ** 2, axis=-1)) / 2
    np.testing.assert_allclose(sums.extra["hidden_distance"], expected, rtol=1e-5)
    rest = 0.5 * (sums.extra["cross_entropy"] + sums.extra["teacher_divergence"])
    np.testing.assert_allclose(sums.loss, rest + 2 * expected, rtol=1e-5)
    gradients, _ = jax.jit(learner.gradients)(state, example, state.key, frozen)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_hidden_states_that_cannot_be_compared_are_refused():
    own = Distilled(objective=CausalLM(), teacher_loss=TeacherLoss(hidden=1.0))
    with pytest.raises(UserError, match=r"states of the teacher have 24 numbers.*outputs=24"):
        own.check_pair(STUDENT, replace(TEACHER, num_layers=2))
    with pytest.raises(UserError, match="the teacher has 1 layers, fewer than the student's 2"):
        own.check_pair(STUDENT, TEACHER)


def last_vectors(config, params, example):
    """Queries, keys and values [batch, seq, heads, width] of the last layer in float64."""
    graph, last = abstract(config, training_layout())[0], [config.num_layers - 1]
    states = jax.jit(lambda p, batch: layer_states(nnx.merge(graph, p), batch, last)[1])
    (x,) = states(params, example.inputs)
    block = jax.tree.map(lambda a: np.asarray(a[-1], np.float64), params["blocks"])
    norm, x = block["attention_norm"], np.asarray(x, np.float64)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm.epsilon)
    x = x * norm["scale"] + norm["bias"]
    found = []
    for name in ("query", "key", "value"):
        layer = block["attention"][name]
        vectors = np.einsum("bse,ehd->bshd", x, layer["weight"]) + layer["bias"]
        found.append(np.repeat(vectors, config.attention.num_heads // vectors.shape[2], axis=2))
    return found


@pytest.mark.parametrize("relation_heads", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_attention_and_values_are_compared_head_by_head(relation_heads, one_device):
    """Of the last layers, by loops over queries, heads and keys, to 1e-5; heads that are shared and
    more in number by relation heads."""
    more = {} if relation_heads is None else {"num_heads": 4, "num_kv_heads": 2}
    attention = replace(STUDENT.attention, **more)
    teacher = replace(TEACHER, num_layers=2, attention=attention)
    terms = TeacherLoss(attention=2.0, relation_heads=relation_heads)
    learner, frozen = learner_of(CausalLM(), terms, STUDENT, teacher)
    learner.objective.check_pair(STUDENT, teacher)
    state = learner.init(seed=0)
    example = to_devices(rows(CausalLM()), learner.layout, WORDS)
    sums = jax.jit(learner.evaluate)(state.params, example, frozen)
    models = (teacher, frozen["teacher"]), (STUDENT, state.params)
    heads = relation_heads or 2
    sides = [
        [a.reshape(*a.shape[:2], heads, -1) for a in last_vectors(*model, example)]
        for model in models
    ]
    segments, weights = (np.asarray(a) for a in (example.inputs.segments, example.targets.weights))
    expected = {"attention_divergence": 0.0, "value_divergence": 0.0}
    for row, query in zip(*np.nonzero(weights)):
        seen = [key for key in range(query + 1) if segments[row, key] == segments[row, query]]
        for head in range(heads):
            for name, (one, other) in zip(expected, ((0, 1), (2, 2))):
                p, q = (
                    log_softmax(side[other][row, seen, head] @ side[one][row, query, head] * scale)
                    for side, scale in ((side, side[0].shape[-1] ** -0.5) for side in sides)
                )
                nats = np.sum(np.exp(p) * (p - q)) / heads
                expected[name] += weights[row, query] * nats
    for name, value in expected.items():
        np.testing.assert_allclose(sums.extra[name], value, rtol=1e-5)
    rest = 0.5 * (sums.extra["cross_entropy"] + sums.extra["teacher_divergence"])
    np.testing.assert_allclose(sums.loss, rest + 2 * sum(expected.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "heads", "message"),
    [
        ({"num_heads": 4}, None, r"the teacher has 4 heads, the student 2: .*relation_heads=4"),
        ({"num_heads": 3}, 16, "relation_heads=16: .* have 24 numbers together, .* student 16"),
        ({"positions": ALiBi()}, None, "scores of the teacher have a bias by distance"),
    ],
)
def test_attention_that_cannot_be_compared_is_refused(teacher, heads, message):
    own = Distilled(
        objective=CausalLM(), teacher_loss=TeacherLoss(attention=1.0, relation_heads=heads)
    )
    with pytest.raises(UserError, match=message):
        own.check_pair(STUDENT, replace(TEACHER, attention=replace(STUDENT.attention, **teacher)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": -1.0}, r"hidden=-1\.0: must be 0 or more"),
        ({"attention": -1.0}, r"attention=-1\.0: must be 0 or more"),
        ({"relation_heads": 4}, "relation_heads=4: .* whose weight is attention=0.0"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"weight": 0.0}, "weight=0.0: must be above 0 and at most 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TeacherLoss(**settings)
    with pytest.raises(UserError, match=r"divergence\.share=1.0"):
        SkewedKL(share=1.0)


@pytest.mark.parametrize(
    "objective",
    [TextLabels(), WeightedSum(objectives=(CausalLM(), CausalLM()), weights=(1.0, 1.0))],
    ids=lambda objective: type(objective).__name__,
)
def test_objectives_that_compare_nothing_are_refused(objective):
    with pytest.raises(UserError, match=f"distillation: {type(objective).__name__} does not"):
        Distilled(objective=objective).check(STUDENT)


def test_a_teacher_that_is_missing_is_told(one_device):
    learner, _ = learner_of(CausalLM(), TeacherLoss())
    model = nnx.merge(learner.graph, learner.init(seed=0).params)
    with pytest.raises(UserError, match="reads the frozen model 'teacher', and there is none"):
        learner.objective.loss(model, rows(CausalLM()), None, {})
