"""Policy and value losses against loops, and the averages that they are taken in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment import (
    AnswerMean,
    ClippedPolicy,
    FixedLengthMean,
    SampledTargets,
    TokenMean,
    clipped_policy_losses,
    clipped_value_sums,
    spread,
)
from lmjax.config import UserError
from lmjax.models import plain_batch
from lmjax.objectives import Example, TokenTargets

ROWS, LENGTH = 6, 8
AVERAGES = {"tokens": TokenMean(), "answers": AnswerMean(), "fixed": FixedLengthMean(length=11)}


def batch(seed, empty=3):
    """log_probs, old, reference, entropies, advantages and a mask; row `empty` has no tokens."""
    random = np.random.default_rng(seed)
    old = -3 * random.random((ROWS, LENGTH))
    arrays = [
        old + 0.4 * random.normal(size=old.shape),
        old,
        old + 0.4 * random.normal(size=old.shape),
        random.random(old.shape),
        random.normal(size=old.shape),
    ]
    mask = random.random(old.shape) < 0.7
    mask[empty] = False
    mask[0, 0] = True
    return *(a.astype(np.float32) for a in arrays), mask


def targets_of(old, reference, advantages, mask):
    """Targets that went through `normalise` of an objective with the average."""
    tokens = TokenTargets(jnp.zeros(mask.shape, jnp.int32), jnp.asarray(mask, jnp.float32))
    return SampledTargets(tokens, *map(jnp.asarray, (old, advantages, reference)))


def example_of(targets):
    """An example with an answer in each row."""
    batch = plain_batch(np.zeros(targets.log_probs.shape, np.int32))
    return Example(jax.tree.map(jnp.asarray, batch), targets)


def sums_of(objective, log_probs, old, reference, entropies, advantages, mask):
    """Sums of the whole batch."""
    example = example_of(targets_of(old, reference, advantages, mask))
    normalised = objective.normalise(example)
    return objective.sums(*map(jnp.asarray, (log_probs, entropies)), normalised.targets)


def token_loss(objective, new, old, reference, advantage):
    """One token's loss, written out."""
    ratio, high = np.exp(new - old), objective.clip_high or objective.clip
    bounded = min(max(ratio, 1 - objective.clip), 1 + high)
    loss = max(-ratio * advantage, -bounded * advantage)
    if objective.dual_clip is not None and advantage < 0:
        loss = min(loss, -objective.dual_clip * advantage)
    lead = new - reference
    divergence = {"k2": lead**2 / 2, "k3": np.exp(-lead) - 1 + lead}
    return loss + objective.kl * divergence[objective.kl_estimator]


def loop(objective, log_probs, old, reference, entropies, advantages, mask):
    """The mean loss, token by token in float64."""
    total, entropy, rows = 0.0, 0.0, sum(mask.any(axis=1))
    for row in range(ROWS):
        tokens = np.flatnonzero(mask[row])
        losses = [
            token_loss(objective, *(np.float64(a[row, t]) for a in given))
            for t in tokens
            for given in [(log_probs, old, reference, advantages)]
        ]
        entropy += sum(float(entropies[row, t]) for t in tokens) / mask.sum()
        if losses:
            parts = {"TokenMean": mask.sum(), "AnswerMean": rows * len(tokens)}
            total += sum(losses) / parts.get(type(objective.average).__name__, rows * 11)
    return total - objective.entropy * entropy


@pytest.mark.parametrize("name", AVERAGES)
@given(seed=st.integers(0, 2**31), dual=st.booleans())
def test_the_loss_is_that_of_the_loop(name, seed, dual):
    objective = ClippedPolicy(
        average=AVERAGES[name],
        clip=0.2,
        clip_high=0.28,
        dual_clip=1.5 if dual else None,
        kl=0.1,
        kl_estimator="k2" if dual else "k3",
        entropy=0.01,
    )
    given = batch(seed)
    found = evaluate(objective, *given)
    np.testing.assert_allclose(found.loss / found.weight, loop(objective, *given), atol=2e-6)
    *arrays, mask = given
    for value in (1e6, np.nan):
        worse = [np.where(mask, a, np.float32(value)) for a in arrays]
        again = evaluate(objective, *worse, mask)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again)):
            np.testing.assert_array_equal(one, other)


evaluate = jax.jit(sums_of, static_argnums=0)


@pytest.mark.parametrize("name", AVERAGES)
def test_gradients_of_a_batch_with_an_empty_row_are_those_of_the_rest(name):
    objective = ClippedPolicy(average=AVERAGES[name], kl=0.1, entropy=0.01)
    *arrays, mask = batch(0)
    poisoned = [np.where(mask, a, np.float32(np.nan)) for a in arrays]

    def mean(log_probs, *others):
        sums = sums_of(objective, log_probs, *others)
        return sums.loss / sums.weight

    found = jax.grad(mean)(*map(jnp.asarray, (*poisoned, mask)))
    rest = np.delete(np.arange(ROWS), 3)
    expected = jax.grad(mean)(*(jnp.asarray(a[rest]) for a in (*arrays, mask)))
    assert not np.asarray(found)[~mask].any()
    np.testing.assert_allclose(np.asarray(found)[rest], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", AVERAGES)
def test_microbatches_add_up_to_the_batch(name):
    """With the weights of the whole batch, to 1e-6 of the loss and of the largest gradient."""
    objective = ClippedPolicy(average=AVERAGES[name], kl=0.1, entropy=0.01)
    log_probs, old, reference, entropies, advantages, mask = map(jnp.asarray, batch(1))
    whole = objective.normalise(example_of(targets_of(old, reference, advantages, mask))).targets

    def loss(log_probs, part):
        own = jax.tree.map(lambda a: a[part], whole)
        sums = objective.sums(log_probs[part], entropies[part], own)
        return sums.loss, sums

    both = jax.value_and_grad(loss, has_aux=True)
    (_, expected), gradient = both(log_probs, slice(None))
    assert expected.weight == objective.weight(example_of(whole)) == mask.sum()
    for microbatches in (2, 3):
        parts = [both(log_probs, slice(i, None, microbatches)) for i in range(microbatches)]
        total = jax.tree.map(lambda *a: sum(a), *(sums for (_, sums), _ in parts))
        for one, other in zip(jax.tree.leaves(total), jax.tree.leaves(expected)):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        added = sum(g for _, g in parts)
        scale = np.abs(np.asarray(gradient)).max()
        np.testing.assert_allclose(added, gradient, rtol=0, atol=1e-6 * scale)


def test_equal_policies_have_ratio_1_and_no_divergence():
    """The loss is then -A, its gradient the plain policy gradient, and nothing is clipped."""
    _, old, _, entropies, advantages, mask = batch(0)
    sums = sums_of(ClippedPolicy(kl=0.1), old, old, old, entropies, advantages, mask)
    for name in ("kl", "approximate_kl", "clip_fraction"):
        assert sums.extra[name] == 0
    np.testing.assert_allclose(sums.loss, -advantages[mask].sum(dtype=np.float64), rtol=1e-5)
    old, advantages, mask = map(jnp.asarray, (old, advantages, mask))
    gradient = jax.grad(lambda new: jnp.sum(clipped_policy_losses(new, old, advantages, mask)[0]))(
        old
    )
    np.testing.assert_allclose(gradient, np.where(mask, -advantages, 0), rtol=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_divergence_in_the_loss_pushes_towards_the_reference(estimator):
    new, _, reference, _, _, mask = map(jnp.asarray, batch(0))
    zeros = jnp.zeros_like(new)

    def loss(new):
        objective = ClippedPolicy(kl=1.0, kl_estimator=estimator)
        return sums_of(objective, new, new, reference, zeros, zeros, mask).loss

    gradient = np.asarray(jax.grad(loss)(new))
    apart = np.asarray(mask) & (np.asarray(new) != np.asarray(reference))
    assert (np.sign(gradient[apart]) == np.sign(np.asarray(new - reference)[apart])).all()


def test_ratios_that_exp_cannot_hold_stay_finite():
    new, old = jnp.asarray([[0.0, -300.0]]), jnp.asarray([[-300.0, 0.0]])
    advantages, mask = jnp.asarray([[-1.0, 1.0]]), jnp.ones((1, 2), bool)

    def loss(new):
        losses, metrics = clipped_policy_losses(new, old, advantages, mask)
        return jnp.sum(losses), metrics

    (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(new)
    assert np.isfinite(total) and np.isfinite(gradient).all()
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(metrics))


def test_metrics_are_means_over_tokens():
    new, old, reference, entropies, advantages, mask = batch(2)
    for average in AVERAGES.values():
        sums = sums_of(
            ClippedPolicy(average=average), new, old, reference, entropies, advantages, mask
        )
        ratio = np.exp(new.astype(np.float64) - old)
        clipped = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
        means = jax.tree.map(lambda a, w=sums.weight: a / w, sums.extra)
        assert float(means["clip_fraction"]) == pytest.approx(clipped[mask].mean())
        kl = (ratio - 1 - np.log(ratio))[mask].mean()
        assert float(means["approximate_kl"]) == pytest.approx(kl, rel=1e-4)
        assert float(means["entropy"]) == pytest.approx(entropies[mask].mean(), rel=1e-5)


@given(seed=st.integers(0, 2**31), clip=st.sampled_from([None, 0.2]))
def test_value_loss_is_that_of_the_loop(seed, clip):
    values, old, returns, _, _, mask = batch(seed)
    found = value_sums(values, old, returns, mask, clip=clip)
    loss, clipped = 0.0, 0
    for row, t in zip(*np.nonzero(mask)):
        v, o, r = (np.float64(a[row, t]) for a in (values, old, returns))
        near = (v if clip is None else min(max(v, o - clip), o + clip)) - r
        loss += max((v - r) ** 2, near**2) / 2
        clipped += near**2 > (v - r) ** 2 and near != v - r
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    assert found.weight == mask.sum()
    for value in (1e6, np.nan):
        worse = [np.where(mask, a, np.float32(value)) for a in (values, old, returns)]
        for one, other in zip(
            jax.tree.leaves(value_sums(*worse, mask, clip=clip)), jax.tree.leaves(found)
        ):
            np.testing.assert_array_equal(one, other)
    slopes = value_slopes(np.where(mask, values, np.float32(np.nan)), old, returns, mask)
    assert np.isfinite(slopes).all() and not np.asarray(slopes)[~mask].any()
    if clip is not None:
        assert abs(float(found.extra["value_clip_fraction"]) - clipped) <= 1  # a tie, rounded


value_sums = jax.jit(clipped_value_sums, static_argnames="clip")
value_slopes = jax.jit(jax.grad(lambda *given: clipped_value_sums(*given).loss))


def test_an_answers_advantage_is_that_of_its_tokens():
    mask = jnp.asarray([[True, False], [False, False]])
    found = spread(jnp.asarray([2.0, jnp.nan]), mask)
    np.testing.assert_array_equal(found, [[2, 0], [0, 0]])


def test_mistakes_are_refused():
    new, old, _, entropies, advantages, mask = map(jnp.asarray, batch(0))
    with pytest.raises(UserError, match=r"advantages has the shape \(6,\); it must be \(6, 8\)"):
        clipped_policy_losses.__wrapped__(new, old, advantages[:, 0], mask)
    targets = dataclasses.replace(targets_of(old, old, advantages, mask), reference=None)
    with pytest.raises(UserError, match=r"kl=0.1, and the targets have no log-probabilities"):
        ClippedPolicy(kl=0.1).sums(new, entropies, targets)
    for settings, message in {
        "clip=1.5": {"clip": 1.5},
        "clip_high=0.0": {"clip_high": 0.0},
        "dual_clip=1.0": {"dual_clip": 1.0},
        "temperature=0.0": {"temperature": 0.0},
        "kl=-1.0": {"kl": -1.0},
    }.items():
        with pytest.raises(UserError, match=settings):
            ClippedPolicy(**message)
    with pytest.raises(UserError, match="length=0: must be 1 or more"):
        FixedLengthMean(length=0)
