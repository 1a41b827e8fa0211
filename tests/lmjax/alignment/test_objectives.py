"""Objectives of alignment through the learner: microbatches, meshes, sums and frozen models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.alignment import (
    DPO,
    AnswerMean,
    ClippedPolicy,
    PairTargets,
    PreferencePairs,
    SampledTargets,
    log_probabilities,
    score,
)
from lmjax.alignment.critic import HEAD
from lmjax.alignment.value_network import ValueLoss
from lmjax.config import UserError, replace
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, abstract
from lmjax.models.batch import Batch
from lmjax.objectives import (
    CausalLM,
    ElasticWeights,
    Example,
    TokenTargets,
    WeightedSum,
    quadratic_penalty,
)
from lmjax.objectives.weighted_sum import join_examples
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices

MODEL = TransformerConfig(
    vocab_size=97,
    hidden=16,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.5,
    heads=(HEAD,),
)
ROWS, LENGTH = 8, 12
POLICY = ClippedPolicy(average=AnswerMean(), kl=0.1, entropy=0.01, temperature=0.7)
PTX = WeightedSum(objectives=(POLICY, CausalLM()), weights=(1.0, 27.8))


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(Mesh(fsdp=2).build(jax.devices()[:2])) as mesh:
        yield mesh


@functools.cache
def learner_of(objective, microbatch=None, frozen=()):
    graph, _ = abstract(MODEL, training_layout())
    # Text has another dropout in every microbatch; answers have none.
    model = MODEL if microbatch is None else replace(MODEL, dropout=0.0)
    return Learner(
        model,
        objective,
        AdamW(),
        lambda step: 1e-2,
        training_layout(),
        microbatch=microbatch,
        frozen=dict.fromkeys(frozen, graph),
    )


@functools.cache
def compiled(*settings):
    learner = learner_of(*settings)
    return jax.jit(lambda s, e, f: learner.gradients(s, e, s.key, f))


def gradients(state, example, objective, microbatch=None, **frozen):
    """Gradients of the mean loss, and the sums."""
    function = compiled(objective, microbatch, tuple(frozen))
    found, sums = function(state, example, frozen or None)
    return jax.device_get((jax.tree.map(lambda g: g / sums.weight, found), sums))


def side(seed, empty=None, pad=0):
    """A batch padded with `pad`, and the targets of its answers; the row `empty` has none."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 97, (ROWS, LENGTH + 1)).astype(np.int32)
    prompts, ends = random.integers(1, 5, ROWS), random.integers(6, LENGTH + 1, ROWS)
    tokens = np.where(np.arange(LENGTH + 1) < ends[:, None], tokens, pad).astype(np.int32)
    index = np.arange(1, LENGTH + 1)
    mask = (index >= prompts[:, None]) & (index < ends[:, None])
    if empty is not None:
        mask[empty] = False
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    segments = (positions < ends[:, None]).astype(np.int32)
    batch = Batch(tokens[:, :-1], positions, segments)
    return batch, TokenTargets(tokens[:, 1:], mask.astype(np.float32))


def sampled(empty=3, pad=0):
    """Answers with advantages, near the log-probabilities of a fresh model: uniform."""
    random = np.random.default_rng(1)
    batch, targets = side(0, empty, pad)
    old, reference = (-np.log(97) + 0.2 * random.normal(size=(2, *targets.tokens.shape))).astype(
        np.float32
    )
    advantages = random.normal(size=old.shape).astype(np.float32)
    return Example(batch, SampledTargets(targets, old, advantages, reference))


def pairs(pad=0):
    (chosen, better), (rejected, worse) = side(2, pad=pad), side(3, empty=5, pad=pad)
    return Example((chosen, rejected), PairTargets(better, worse))


def text():
    tokens = np.random.default_rng(4).integers(0, 97, (ROWS, LENGTH + 1)).astype(np.int32)
    return CausalLM().prepare(tokens, np.ones_like(tokens), np.arange(ROWS).astype(np.uint64))


def on_devices(example):
    return to_devices(example, training_layout(), MODEL.vocab_size)


def state_of(seed=0):
    return learner_of(CausalLM()).init(seed)


def assert_near(found, expected):
    """1e-6 of the largest gradient: sums of float32 in another order."""
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * scale)


def assert_equal_sums(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_ppo_ptx_is_the_sum_of_both_gradients():
    """PPO + 27.8 times pretraining, each a mean over its own tokens (Ouyang et al., eq. 2)."""
    example, state = on_devices(join_examples([sampled(), text()])), state_of()
    policy, alone = gradients(state, on_devices(sampled()), POLICY)
    # A key for dropout is given to both terms alike: the pretraining term has it, PPO has not.
    pretraining, sums = gradients(state, on_devices(text()), CausalLM())
    expected = jax.tree.map(lambda p, q: p + 27.8 * q, policy, pretraining)
    found, both = gradients(state, example, PTX)
    assert_near(found, expected)
    np.testing.assert_allclose(
        both.extra["loss_2"] / both.weight, sums.loss / sums.weight, rtol=1e-6
    )
    for name, value in alone.extra.items():
        mean = both.extra[f"{name}_1"] / both.weight
        np.testing.assert_allclose(mean, value / alone.weight, rtol=1e-5, err_msg=name)


def valued(pad=0):
    """Answers with values of a critic, and returns."""
    example, random = sampled(pad=pad), np.random.default_rng(5)
    values, returns = random.normal(size=(2, ROWS, LENGTH)).astype(np.float32)
    return Example(
        example.inputs, dataclasses.replace(example.targets, values=values, returns=returns)
    )


def with_text(pad=0):
    """Answers, and rows of text: half as many."""
    half = jax.tree.map(lambda a: a[: ROWS // 2], text())
    return join_examples([sampled(pad=pad), half])


OBJECTIVES = {
    "policy": (POLICY, valued),
    "pairs": (PreferencePairs(), pairs),
    "critic of its own": (ValueLoss(), valued),
    "PPO-ptx": (PTX, with_text),
}


# PPO-ptx is the policy's objective beside another.
APART = [name for name in OBJECTIVES if name != "policy"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "pairs")) for n in APART]
)
def test_microbatches_give_the_gradient_of_the_batch(name):
    """One of the rows has no answer; dropout, of one half, is off but for text."""
    (objective, example), state = OBJECTIVES[name], state_of()
    frozen = {"reference": state_of(1).params} if name == "pairs" else {}
    example = on_devices(example())
    whole = ROWS if name == "PPO-ptx" else None
    expected, sums = gradients(state, example, objective, whole, **frozen)
    found, parts = gradients(state, example, objective, ROWS // 2, **frozen)
    assert_near(found, expected)
    assert_equal_sums(parts, sums)
    if name == "pairs":
        assert sums.weight == ROWS - 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_may_be_any_token(name):
    """Not a bit of the gradients or of a metric changes, whatever stands behind the answers."""
    (objective, example), state = OBJECTIVES[name], state_of()
    frozen = {"reference": state_of(1).params} if name == "pairs" else {}
    one, other = (
        gradients(state, on_devices(example(pad=pad)), objective, **frozen) for pad in (0, 96)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices, real or simulated")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "pairs")) for n in APART]
)
def test_any_mesh_gives_the_loss_of_one_device(name):
    objective, example = OBJECTIVES[name]
    found = []
    for mesh in (Mesh(fsdp=1), Mesh(fsdp=2, context=2, tensor=2)):
        count = mesh.fsdp * mesh.context * mesh.tensor
        with jax.set_mesh(mesh.build(jax.devices()[:count])):
            frozen = ("reference",) if name == "pairs" else ()
            learner = learner_of.__wrapped__(objective, frozen=frozen)
            params = [learner.init(seed).params for seed in (0, 1)]
            given = on_devices(example())
            sums = learner.compiled_evaluate(params[0], given, dict.fromkeys(frozen, params[1]))
            found.append(jax.device_get(sums))
    assert_equal_sums(*found)


def test_before_the_first_update_ratios_are_1_at_every_temperature():
    """With the log-probabilities that the objective's own function gives for the answers."""
    state = state_of()
    for temperature in (0.5, 1.3):
        example = on_devices(sampled())

        @jax.jit
        def rescored(params, example, temperature=temperature):
            model = nnx.merge(learner_of(CausalLM()).graph, params)
            hidden, _ = model(example.inputs)
            return log_probabilities(model, hidden, example.targets.answers.tokens, temperature)

        log_probs = rescored(state.params, example)
        targets = dataclasses.replace(example.targets, log_probs=log_probs, reference=log_probs)
        objective = ClippedPolicy(kl=0.1, temperature=temperature)
        _, sums = gradients(state, Example(example.inputs, targets), objective)
        for name in ("kl", "approximate_kl"):
            assert 0 <= sums.extra[name] / sums.weight < 1e-9
        assert sums.extra["clip_fraction"] == 0


def test_a_policy_equal_to_its_reference_has_the_loss_log_2():
    """Once from a frozen model, once from log-probabilities in the targets."""
    state, example = state_of(), on_devices(pairs())
    _, sums = gradients(state, example, PreferencePairs(), reference=state.params)
    np.testing.assert_allclose(sums.loss / sums.weight, np.log(2), rtol=1e-6)

    @jax.jit
    def reference(params, example):
        model = nnx.merge(learner_of(CausalLM()).graph, params)
        targets = example.targets.chosen, example.targets.rejected
        sides = [score(model, *given).log_probs for given in zip(example.inputs, targets)]
        return jnp.stack(sides, axis=1)[:, None]

    targets = dataclasses.replace(example.targets, reference=reference(state.params, example))
    _, again = gradients(state, Example(example.inputs, targets), PreferencePairs())
    np.testing.assert_allclose(again.loss / again.weight, np.log(2), rtol=1e-6)
    with pytest.raises(UserError, match="compares with a reference policy"):
        gradients(state, example, PreferencePairs(preference=DPO(beta=0.2)))


def test_the_elastic_penalty_is_added_to_any_objective():
    """Its gradient is strength x fisher x (parameter - anchor), in microbatches too."""
    state, anchor = state_of(), state_of(1).params
    fisher = jax.tree.map(np.abs, jax.device_get(state_of(2).params))
    fisher = jax.device_put(fisher, jax.tree.map(lambda a: a.sharding, anchor))
    elastic, example = ElasticWeights(objective=POLICY, strength=3.0), on_devices(sampled())
    found, sums = gradients(state, example, elastic, ROWS // 2, anchor=anchor, fisher=fisher)
    plain, own = gradients(state, example, POLICY)
    params, anchor, fisher = jax.device_get((state.params, anchor, fisher))
    penalty = lambda p, a, f: 3 * f * (p - a)  # noqa: E731
    expected = jax.tree.map(lambda g, *paf: g + penalty(*paf), plain, params, anchor, fisher)
    assert_near(found, expected)
    more = 3 * jax.jit(quadratic_penalty)(params, anchor, fisher)
    np.testing.assert_allclose(sums.loss, own.loss + more * own.weight, rtol=1e-5)
    np.testing.assert_allclose(sums.extra["elastic_penalty"] / sums.weight, more, rtol=1e-5)
    assert sums.extra["cross_entropy"] == pytest.approx(float(own.loss), rel=1e-5)


def test_the_elastic_penalty_needs_its_models():
    with pytest.raises(UserError, match="reads the frozen model 'anchor', and there is none"):
        gradients(state_of(), on_devices(sampled()), ElasticWeights(objective=POLICY))
    with pytest.raises(UserError, match=r"strength=0.0: must be above 0"):
        ElasticWeights(objective=POLICY, strength=0.0)
