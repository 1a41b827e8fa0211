"""Advantages and loss of a critic, beside loops and numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.alignment import ClippedPolicy, SampledTargets
from lmjax.alignment.critic import critic_advantages
from lmjax.objectives import TokenTargets


def test_advantages_of_tokens_are_those_of_a_loop():
    """In float64, over the real tokens of all rows; to float32's rounding."""
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=(2, 4, 9)).astype(np.float32)
    mask = np.zeros((4, 9), bool)
    for row, (begin, end) in enumerate([(2, 6), (0, 9), (5, 6), (3, 8)]):
        mask[row, begin:end] = True
    advantages = np.zeros((4, 9))
    for row in range(4):
        following = value = 0.0
        for token in reversed(np.flatnonzero(mask[row])):
            delta = float(rewards[row, token]) + value - float(values[row, token])
            following, value = delta + 0.9 * following, float(values[row, token])
            advantages[row, token] = following
    spoilt = (np.where(mask, a, np.float32(np.nan)) for a in (rewards, values))
    found, returns = critic_advantages(*spoilt, mask, 0.9)
    real = advantages[mask]
    np.testing.assert_allclose(
        np.asarray(found)[mask], (real - real.mean()) / real.std(), atol=1e-5
    )
    np.testing.assert_allclose(np.asarray(returns)[mask], real + values[mask], atol=1e-5)
    assert not np.asarray(found)[~mask].any()


def test_the_loss_of_the_critic_is_that_of_numpy():
    """To float32's rounding; what stands outside of the replies does not count."""
    generator = np.random.default_rng(0)
    values, old, returns = generator.normal(size=(3, 3, 5)).astype(np.float32)
    mask = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]], np.float32)
    near = np.clip(values, old - 0.3, old + 0.3)
    expected = (np.maximum((values - returns) ** 2, (near - returns) ** 2) * mask).sum() / 2
    answers = TokenTargets(np.zeros((3, 5), np.int32), mask)
    spoilt = (np.where(mask > 0, a, np.float32(np.nan)) for a in (old, returns))
    targets = SampledTargets(answers, values, values, None, *map(jnp.asarray, spoilt))
    sums = ClippedPolicy(value_clip=0.3).critic_sums(jnp.asarray(values), targets)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)
    assert float(sums.weight) == 7
