"""Estimators of the divergence by enumeration, rewards of tokens, and prices of the divergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment import (
    AdaptiveKL,
    FallingKL,
    FixedKL,
    k1,
    k2,
    k3,
    token_rewards,
)
from lmjax.config import UserError

WORDS = 6


def distributions(seed):
    """Logits of a policy and log-probabilities of a reference."""
    random = np.random.default_rng(seed)
    logits, other = random.normal(size=(2, WORDS)).astype(np.float32)
    return jnp.asarray(logits), jax.nn.log_softmax(jnp.asarray(other))


def divergence(logits, reference):
    """KL(policy | reference)."""
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - reference))


def backwards(logits, reference):
    """KL(reference | policy)."""
    return jnp.sum(jnp.exp(reference) * (reference - jax.nn.log_softmax(logits)))


@pytest.mark.parametrize("seed", range(5))
def test_estimators_by_enumeration(seed):
    """k1 and k3 have the divergence as their mean; as a loss k2 has its gradient."""
    logits, reference = distributions(seed)
    p = jax.nn.softmax(logits)

    def mean(estimator, logits):  # over tokens that were sampled from p, whatever the logits
        return jnp.sum(p * estimator(jax.nn.log_softmax(logits), reference))

    expected = divergence(logits, reference)
    for estimator in (k1, k3):
        np.testing.assert_allclose(mean(estimator, logits), expected, atol=2e-6)
    gradients = {e: jax.grad(functools.partial(mean, e))(logits) for e in (k1, k2, k3)}
    np.testing.assert_allclose(gradients[k1], np.zeros(WORDS), atol=2e-6)
    np.testing.assert_allclose(gradients[k2], jax.grad(divergence)(logits, reference), atol=2e-6)
    np.testing.assert_allclose(gradients[k3], jax.grad(backwards)(logits, reference), atol=2e-6)


k3_and_slope = jax.jit(jax.value_and_grad(k3))


@given(st.floats(-1e3, 1e3, width=32), st.integers(0, 40))
def test_k3_is_never_negative_and_finite(size, halvings):
    """Also where the log-ratio is so small that exp(x) - 1 - x has no digits left."""
    x = np.float32(size * 0.5**halvings)
    for ratio in (x, -x):
        found, slope = map(float, k3_and_slope(ratio, np.float32(0)))
        assert 0 <= found < np.inf and np.isfinite(slope)
    if abs(x) < 20:  # expm1 of XLA is right to about 2 units in the last digit of x
        exact = np.expm1(np.float64(-x)) + np.float64(x)
        found = float(k3_and_slope(x, np.float32(0))[0])
        assert found == pytest.approx(exact, rel=1e-5, abs=5e-7 * float(abs(x)))


def test_equal_policies_do_not_diverge():
    log_probs = -jnp.arange(5.0)
    for estimator in (k1, k2, k3):
        assert not np.any(estimator(log_probs, log_probs))


@pytest.mark.parametrize("seed", range(5))
def test_rewards_of_tokens_are_those_of_the_loop(seed):
    random = np.random.default_rng(seed)
    scores = random.normal(size=4).astype(np.float32)
    scores[0] = 0.0  # a score like any other
    kl = random.random((4, 6)).astype(np.float32)
    mask = random.random((4, 6)) < 0.6
    mask[2] = False
    expected = np.zeros((4, 6))
    for row in range(4):
        for t in np.flatnonzero(mask[row]):
            last = t == np.flatnonzero(mask[row])[-1]
            expected[row, t] = scores[row] * last - 0.1 * kl[row, t]
    for value in (0.0, 1e6, np.nan):
        worse = np.where(mask, kl, np.float32(value))
        scores[2] = value  # of the row without tokens
        found = token_rewards(*map(jnp.asarray, (scores, worse, mask)), 0.1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"scores has the shape \(2, 1\); it must be \(2,\)"):
        token_rewards.__wrapped__(jnp.zeros((2, 1)), jnp.zeros((2, 3)), jnp.ones((2, 3), bool), 0.1)


def test_the_divergence_pushes_towards_the_reference():
    """Without any other reward, the policy gradient of -beta k1 lessens the divergence."""
    logits, reference = distributions(0)
    log_p = jax.nn.log_softmax(logits)
    kl = k1(log_p, reference)[:, None]
    rewards = token_rewards(jnp.zeros(WORDS), kl, jnp.ones((WORDS, 1), bool), 0.1)[:, 0]

    def loss(logits):  # each token as often as it is sampled
        return -jnp.sum(jnp.exp(log_p) * rewards * jax.nn.log_softmax(logits))

    better = logits - 0.5 * jax.grad(loss)(logits)
    assert divergence(better, reference) < divergence(logits, reference)


@pytest.mark.parametrize(("kl", "factor"), [(60.0, 1.2), (6.6, 1.1), (6.0, 1.0), (0.0, 0.8)])
def test_beta_follows_the_divergence(kl, factor):
    beta = jnp.float32(0.2)
    control = AdaptiveKL(beta=0.2, target=6.0, horizon=10_000)
    found = control.update(beta, jnp.float32(kl), episodes=10_000)
    assert float(found) == pytest.approx(0.2 * factor, rel=1e-5)
    assert FixedKL(beta=0.2).update(beta, jnp.float32(kl), 512) == beta


def test_beta_falls_by_a_factor():
    """To the closed form 0.2 (0.005 / 0.2)^(step / 8), within float32's rounding of eight steps."""
    control, beta, found = FallingKL(beta=0.2, final=0.005, steps=8), jnp.float32(0.2), []
    for _ in range(12):
        found.append(float(beta))
        beta = control.update(beta, jnp.float32(3.0), episodes=512)
    expected = [0.2 * 0.025 ** (min(step, 8) / 8) for step in range(12)]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_prices_that_cannot_be_meant():
    with pytest.raises(UserError, match=r"final=0.3: must be above 0, and at most beta=0.2"):
        FallingKL(beta=0.2, final=0.3)
    with pytest.raises(UserError, match=r"steps=0: must be at least 1"):
        FallingKL(beta=0.2, steps=0)
    with pytest.raises(UserError, match=r"beta=-0.1: must be 0 or more"):
        FixedKL(beta=-0.1)
    with pytest.raises(UserError, match=r"target=0.0: must be above 0"):
        AdaptiveKL(target=0.0)
