"""Advantages, returns and whitening, against written-out loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment import (
    generalized_advantages,
    group_relative,
    leave_one_out,
    masked_mean,
    reinforce_plus_plus,
    whiten,
)
from lmjax.config import UserError

ROWS, LENGTH = 4, 7
POISON = [1e6, np.nan]
SEEDS = st.integers(0, 2**31)


def batch(seed):
    """Rewards, values, a mask with holes and one row without real tokens, and bootstraps."""
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, ROWS, LENGTH)).astype(np.float32)
    mask = random.random((ROWS, LENGTH)) < 0.7
    mask[1] = False
    bootstrap = random.normal(size=ROWS).astype(np.float32) * (random.random(ROWS) < 0.5)
    return rewards, values, mask, bootstrap.astype(np.float32)


def loop(rewards, values, mask, bootstrap, gamma, decay):
    """The sums of the paper's equation 16, over the real tokens of each row alone."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        steps = np.flatnonzero(mask[row])
        state = np.append(values[row, steps].astype(np.float64), bootstrap[row])
        delta = rewards[row, steps] + gamma * state[1:] - state[:-1]
        for t in range(len(steps)):
            powers = (gamma * decay) ** np.arange(len(steps) - t)
            advantages[row, steps[t]] = np.sum(powers * delta[t:])
    return advantages, np.where(mask, advantages + values, 0)


def poisoned(array, mask, value):
    return jnp.asarray(np.where(mask, array, np.float32(value)))


estimate = jax.jit(generalized_advantages, static_argnames=("gamma", "decay"))
whitened = jax.jit(whiten, static_argnames="shift_mean")
mean = jax.jit(masked_mean)


@given(seed=SEEDS, gamma=st.sampled_from([0.9, 1.0]), decay=st.sampled_from([0.0, 0.95, 1.0]))
def test_generalized_advantages_are_those_of_the_loop(seed, gamma, decay):
    rewards, values, mask, bootstrap = batch(seed)
    found = estimate(rewards, values, mask, bootstrap, gamma=gamma, decay=decay)
    for one, other in zip(found, loop(rewards, values, mask, bootstrap, gamma, decay)):
        np.testing.assert_allclose(one, other, atol=1e-5)  # sums of 7 float32 of size 1
    for value in POISON:
        again = estimate(
            poisoned(rewards, mask, value),
            poisoned(values, mask, value),
            mask,
            bootstrap,
            gamma=gamma,
            decay=decay,
        )
        for one, other in zip(found, again):
            np.testing.assert_array_equal(one, other)


def test_numbers_of_an_answer_that_ended():
    """Worked by hand: values 0.5, 0.6, 0.7, and a reward of 1 at the end."""
    rewards = jnp.asarray([[0.0, 0, 1]])
    values = jnp.asarray([[0.5, 0.6, 0.7]])
    found, returns = generalized_advantages(rewards, values, jnp.ones((1, 3), bool))
    np.testing.assert_allclose(found, [[0.46575, 0.385, 0.3]], rtol=1e-5)
    np.testing.assert_allclose(returns, [[0.96575, 0.985, 1.0]], rtol=1e-6)


def test_an_answer_that_was_cut_off_goes_on_with_its_value():
    """With the value that the rest would have had, the advantages are those of the whole."""
    rewards, values, _, _ = batch(0)
    mask = np.ones((ROWS, LENGTH), bool)
    whole, _ = generalized_advantages(*map(jnp.asarray, (rewards, values, mask)), decay=0.0)
    cut = np.arange(LENGTH) < 4
    part, _ = generalized_advantages(
        *map(jnp.asarray, (rewards, values, mask & cut, values[:, 4])), decay=0.0
    )
    np.testing.assert_allclose(part[:, :4], whole[:, :4], rtol=1e-6)
    assert not np.any(part[:, 4:])


def test_a_bootstrap_of_another_shape_is_refused():
    rewards, values, mask, bootstrap = map(jnp.asarray, batch(0))
    plain = generalized_advantages.__wrapped__  # the tests check shapes before it does
    with pytest.raises(UserError, match=r"bootstrap has the shape \(4, 1\); it must be \(4,\)"):
        plain(rewards, values, mask, bootstrap[:, None])


def test_no_gradient_passes():
    rewards, values, mask, _ = map(jnp.asarray, batch(0))

    def total(values):
        return sum(map(jnp.sum, generalized_advantages(rewards, values, mask)))

    assert not np.any(jax.grad(total)(values))


@given(seed=SEEDS, shift_mean=st.booleans())
def test_whitening_is_that_of_the_real_entries(seed, shift_mean):
    values, _, mask, _ = batch(seed)
    found = whitened(values, mask, shift_mean=shift_mean)
    real = values[mask].astype(np.float64)
    expected = np.zeros(values.shape)
    if real.size:
        scaled = (real - real.mean()) / np.sqrt(((real - real.mean()) ** 2).mean() + 1e-8)
        expected[mask] = scaled if shift_mean else scaled + real.mean()
    np.testing.assert_allclose(found, expected, atol=1e-4)  # the deviation may be small
    for value in POISON:
        again = whitened(poisoned(values, mask, value), mask, shift_mean=shift_mean)
        np.testing.assert_array_equal(found, again)
        assert mean(poisoned(values, mask, value), mask) == mean(values, mask)


def groups(seed):
    """Rewards of 4 prompts with 7 answers at most, one with a single answer and one with none."""
    rewards, _, real, _ = batch(seed)
    real[0] = np.arange(LENGTH) == 3
    return rewards, real


GROUPED = {
    "leave_one_out": leave_one_out,
    "grpo": group_relative,
    "grpo_population": lambda r, real: group_relative(r, real, ddof=0),
    "dr_grpo": lambda r, real: group_relative(r, real, scaled=False),
    "reinforce_plus_plus": reinforce_plus_plus,
}
GROUPED = {name: jax.jit(function) for name, function in GROUPED.items()}


def by_hand(name, group):
    """Advantages of one group of at least two answers."""
    group = group.astype(np.float64)
    if name == "leave_one_out":
        return [r - np.delete(group, i).mean() for i, r in enumerate(group)]
    centred = group - group.mean()
    if name == "dr_grpo":
        return centred
    return centred / (group.std(ddof=int(name == "grpo")) + 1e-4)


@pytest.mark.parametrize("name", list(GROUPED)[:-1])
@given(seed=SEEDS)
def test_groups_against_loops(name, seed):
    rewards, real = groups(seed)
    found = np.asarray(GROUPED[name](rewards, real))
    expected = np.zeros(rewards.shape)
    for prompt in range(len(rewards)):
        if real[prompt].sum() > 1:
            expected[prompt, real[prompt]] = by_hand(name, rewards[prompt, real[prompt]])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert not found[0].any() and not found[1].any()  # a group of one, and of none
    for value in POISON:
        again = GROUPED[name](poisoned(rewards, real, value), real)
        np.testing.assert_array_equal(found, again)


@given(seed=SEEDS)
def test_reinforce_plus_plus_divides_by_one_deviation(seed):
    rewards, real = groups(seed)
    found = np.asarray(GROUPED["reinforce_plus_plus"](rewards, real))
    counted = real & (real.sum(axis=1, keepdims=True) > 1)
    centred = np.zeros(rewards.shape)
    for prompt in range(len(rewards)):
        if (own := counted[prompt]).any():
            group = rewards[prompt, own].astype(np.float64)
            centred[prompt, own] = group - group.mean()
    if counted.any():
        expected = centred / np.sqrt((centred[counted] ** 2).mean() + 1e-8)
        np.testing.assert_allclose(found, expected, atol=1e-3)
    assert not found[~counted].any()


def test_two_answers_have_the_stated_advantages():
    rewards = jnp.asarray([[0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(
        group_relative(rewards), [[-0.70701, 0.70701], [0, 0]], atol=1e-5
    )  # 0.5 / (0.70711 + 1e-4)
    np.testing.assert_allclose(group_relative(rewards, ddof=0)[0], [-0.9998, 0.9998], atol=1e-5)
    np.testing.assert_array_equal(group_relative(jnp.asarray([[5.0]])), [[0.0]])
    np.testing.assert_array_equal(leave_one_out(rewards), [[-1, 1], [0, 0]])
