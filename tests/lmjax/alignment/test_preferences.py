"""Losses of preferences, against their formulas in float64 and in their fixed points."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.alignment import DPO, IPO, KTO, ORPO, Answers, HingeDPO, SimPO, kto_divergence
from lmjax.config import UserError

PAIRS = 6
LOSSES = {
    "dpo": DPO(beta=0.3),
    "conservative": DPO(beta=0.3, label_smoothing=0.1),
    "hinge": HingeDPO(beta=0.3),
    "ipo": IPO(beta=0.3),
    "simpo": SimPO(beta=2.0, gamma=0.5),
    "orpo": ORPO(weight=0.2),
}
VALUES = [0.0, 1e6, np.nan, np.inf]


def answers(seed, empty=None):
    """Answers of 1 to 8 tokens of 0.5 to 2.5 nats; that numbered `empty` does not exist."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, PAIRS).astype(np.float32)
    log_probs, reference = (-lengths * (0.5 + 2 * random.random((2, PAIRS)))).astype(np.float32)
    if empty is not None:
        lengths[empty] = 0
    return Answers(*map(jnp.asarray, (log_probs, lengths, reference)))


def by_hand(name, chosen, rejected):
    """The loss of each pair, from its paper."""
    c, r, m, n, c_ref, r_ref = (
        np.asarray(a, np.float64)
        for a in (
            *(chosen.log_probs, rejected.log_probs, chosen.lengths, rejected.lengths),
            *(chosen.reference, rejected.reference),
        )
    )
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    h = (c - c_ref) - (r - r_ref)
    if name == "dpo":
        return -np.log(sigmoid(0.3 * h))
    if name == "conservative":
        return -0.9 * np.log(sigmoid(0.3 * h)) - 0.1 * np.log(sigmoid(-0.3 * h))
    if name == "hinge":
        return np.maximum(0, 1 - 0.3 * h)
    if name == "ipo":
        return ((c - c_ref) / m - (r - r_ref) / n - 1 / 0.6) ** 2
    if name == "simpo":
        return -np.log(sigmoid(2 / m * c - 2 / n * r - 0.5))
    p, q = np.exp(c / m), np.exp(r / n)
    return -c / m - 0.2 * np.log(sigmoid(np.log(p / (1 - p) * (1 - q) / q)))


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_that_of_its_paper(name):
    chosen, rejected = answers(0), answers(1)
    found = LOSSES[name].sums(chosen, rejected)
    # float32 of numbers of the size of 10.
    np.testing.assert_allclose(found.loss, by_hand(name, chosen, rejected).sum(), rtol=2e-6)
    assert found.weight == PAIRS
    better = LOSSES[name].rewards(chosen) > LOSSES[name].rewards(rejected)
    assert found.extra["accuracy"] == jnp.sum(better)
    np.testing.assert_allclose(
        found.extra["margin"],
        found.extra["chosen_reward"] - found.extra["rejected_reward"],
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_without_an_answer_is_none(name):
    """The rest has the loss and gradients that it has alone, whatever is in the empty answer."""
    loss, rejected = LOSSES[name], answers(1)

    def apply(log_probs, chosen, rejected):
        return loss.sums(dataclasses.replace(chosen, log_probs=log_probs), rejected).loss

    whole, rest = answers(0, empty=2), jnp.asarray([0, 1, 3, 4, 5])
    some = [jax.tree.map(lambda a: a[rest], side) for side in (whole, rejected)]
    expected, gradients = jax.value_and_grad(apply)(some[0].log_probs, *some)
    for value in VALUES:
        bad = dataclasses.replace(
            whole,
            log_probs=whole.log_probs.at[2].set(value),
            reference=whole.reference.at[2].set(value),
        )
        found, d_log_probs = jax.value_and_grad(apply)(bad.log_probs, bad, rejected)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(d_log_probs[rest], gradients, rtol=1e-6)
        assert d_log_probs[2] == 0
        assert loss.sums(bad, rejected).weight == PAIRS - 1


def test_at_the_reference_the_loss_is_log_2_and_the_margin_0():
    """Exactly: -log sigmoid(0), smoothed or not."""
    chosen, rejected = (
        dataclasses.replace(side, reference=side.log_probs) for side in (answers(0), answers(1))
    )
    for loss in (DPO(beta=0.1), DPO(beta=7.0), DPO(label_smoothing=0.25)):
        first = jax.tree.map(lambda a: a[:1], (chosen, rejected))
        sums = loss.sums(*first)
        assert sums.loss == jnp.float32(np.log(2))
        assert sums.extra["margin"] == 0 and sums.extra["accuracy"] == 0
    assert IPO(beta=0.5).sums(chosen, rejected).loss == PAIRS


def test_no_gradient_passes_to_the_reference():
    chosen, rejected = answers(0), answers(1)

    def apply(reference):
        return DPO().sums(dataclasses.replace(chosen, reference=reference), rejected).loss

    assert not np.any(jax.grad(apply)(chosen.reference))


def test_certain_answers_have_finite_odds():
    sure = Answers(jnp.zeros(2), jnp.ones(2))
    gradient = jax.grad(
        lambda a: ORPO().sums(Answers(a, jnp.ones(2)), Answers(-jnp.ones(2), jnp.ones(2))).loss
    )(sure.log_probs)
    assert np.isfinite(gradient).all()


KTOS = KTO(beta=0.3, desirable=1.33, undesirable=0.5)


def kto_by_hand(given, wanted, kl):
    ratio = np.asarray(given.log_probs - given.reference, np.float64)
    value = 1 / (1 + np.exp(-0.3 * np.where(wanted, ratio - kl, kl - ratio)))
    return np.where(wanted, 1.33, 0.5) * (1 - value)


def test_kto_is_that_of_its_paper():
    given, wanted = answers(0, empty=4), np.arange(PAIRS) % 2 == 0
    found = KTOS.sums(given, jnp.asarray(wanted), jnp.float32(0.7))
    real = np.asarray(given.lengths) > 0
    expected = kto_by_hand(given, wanted, 0.7)[real].sum()
    np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
    assert found.weight == PAIRS - 1
    assert found.extra["kl"] / found.weight == pytest.approx(0.7)


def test_the_divergence_of_kto_is_a_constant_of_at_least_0():
    given = answers(0, empty=4)
    real = np.asarray(given.lengths) > 0
    mean = np.asarray(given.log_probs - given.reference)[real].mean()
    forwards = kto_divergence(given)
    backwards = kto_divergence(Answers(given.reference, given.lengths, reference=given.log_probs))
    assert sorted([float(forwards), float(backwards)]) == pytest.approx([0, abs(mean)])

    def apply(log_probs):
        own = dataclasses.replace(given, log_probs=log_probs)
        return kto_divergence(own)

    assert not np.any(jax.grad(apply)(given.log_probs))
    assert not jax.grad(lambda kl: KTOS.sums(given, jnp.ones(PAIRS, bool), kl).loss)(0.3)


def test_parts_of_a_batch_add_up():
    """The divergence of the whole batch in each part."""
    given, wanted = answers(0), jnp.arange(PAIRS) < 2
    kl = kto_divergence(answers(1))
    whole = KTOS.sums(given, wanted, kl)
    parts = [
        KTOS.sums(jax.tree.map(lambda a, p=p: a[p::2], given), wanted[p::2], kl) for p in (0, 1)
    ]
    total = jax.tree.map(lambda a, b: a + b, *parts)
    for one, other in zip(jax.tree.leaves(total), jax.tree.leaves(whole)):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_mistakes_are_refused():
    chosen = answers(0)
    without = dataclasses.replace(chosen, reference=None)
    with pytest.raises(UserError, match="compares with a reference policy"):
        DPO().sums(without, without)
    SimPO().sums(without, without)
    wrong = dataclasses.replace(without)
    object.__setattr__(wrong, "lengths", wrong.lengths[:, None])  # unseen by the tests' own checks
    with pytest.raises(UserError, match=r"lengths has the shape \(6, 1\); it must be \(6,\)"):
        SimPO().sums(wrong, without)
    with pytest.raises(UserError, match=r"rejected.log_probs has the shape \(5,\)"):
        DPO().sums(chosen, jax.tree.map(lambda a: a[:5], chosen))
    with pytest.raises(UserError, match=r"beta=0.0: must be above 0"):
        SimPO(beta=0.0)
    with pytest.raises(UserError, match=r"label_smoothing=0.5: must be"):
        DPO(label_smoothing=0.5)
