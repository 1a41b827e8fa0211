"""Advantages: how much better an answer or a token was than expected.

All are constants of the loss: no gradient passes through them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmjax.alignment.masks import keep, masked_mean, require_shape, whole_rows


def generalized_advantages(
    rewards: Float[Array, "rows seq"],
    values: Float[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    bootstrap: Float[Array, "rows"] | None = None,
    *,
    gamma: float = 1.0,
    decay: float = 0.95,
) -> tuple[Float[Array, "rows seq"], Float[Array, "rows seq"]]:
    """Advantages and returns by generalized advantage estimation (GAE; Schulman et al. 2016).

    A_t = delta_t + gamma decay A_t+1, with delta_t = r_t + gamma V_t+1 - V_t; returns are A + V.
    The next of a token is the next real one: padding, and tokens of tools in the middle of an
    answer, are no steps.

    Args:
      rewards: of each token.
      values: what a critic expects before it.
      mask: real tokens.
      bootstrap: value of the state after the last real token, where the answer was cut off; 0 where
        it ended. None: all ended.
      gamma: discount of the future.
      decay: the lambda of the paper: 1 trusts the rewards alone, 0 the next value.

    Returns:
      Advantages and returns; 0 where the mask is false.
    """
    rewards, values, mask = (whole_rows(a) for a in (rewards, values, mask))
    rewards, values = keep(rewards, mask), keep(values, mask)
    bootstrap = jnp.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap
    require_shape("bootstrap", bootstrap, mask.shape[:1])

    def step(following, token):
        (next_value, next_advantage), (reward, value, real) = following, token
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * decay * next_advantage
        here = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return here, jnp.where(real, advantage, 0)

    start = bootstrap, jnp.zeros_like(bootstrap)
    _, advantages = jax.lax.scan(step, start, (rewards.T, values.T, mask.T), reverse=True)
    return jax.lax.stop_gradient((advantages.T, keep(advantages.T + values, mask)))


def whiten(
    values: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> Float[Array, "*shape"]:
    """Values over their standard deviation, less their mean, both over real entries alone.

    The array must be that of the whole batch: whitened in parts, the parts lose what sets them
    apart. The variance is that of a population (ddof 0).

    Args:
      values: tokens' or answers'.
      mask: real entries; the others become 0.
      shift_mean: false keeps the mean as it was (rewards).
      epsilon: added to the variance.
    """
    mean = masked_mean(values, mask)
    centred = keep(values - mean, mask)
    scaled = centred * jax.lax.rsqrt(masked_mean(jnp.square(centred), mask) + epsilon)
    return jax.lax.stop_gradient(scaled if shift_mean else keep(scaled + mean, mask))


def leave_one_out(
    rewards: Float[Array, "prompts samples"], real: Bool[Array, "prompts samples"] | None = None
) -> Float[Array, "prompts samples"]:
    """RLOO: reward less the mean of the prompt's other answers (Ahmadian et al. 2024).

    An answer without others has advantage 0, and so have those that are not real.
    """
    centred, count = _centred(rewards, real)
    return jax.lax.stop_gradient(centred * count / jnp.where(count > 1, count - 1, 1))


def group_relative(
    rewards: Float[Array, "prompts samples"],
    real: Bool[Array, "prompts samples"] | None = None,
    *,
    scaled: bool = True,
    ddof: int = 1,
    epsilon: float = 1e-4,
) -> Float[Array, "prompts samples"]:
    """GRPO: reward less the mean of the prompt's answers, over their standard deviation.

    Shao et al. 2024 (arXiv:2402.03300), which does not say which deviation: with ddof 1, that of a
    sample, two answers have advantages of 0.707 (as in TRL), with ddof 0 of 1. An answer without
    others has advantage 0, and so have those that are not real.

    Args:
      rewards: of all answers to each prompt.
      real: answers that count; None: all.
      scaled: divide by the deviation; false is Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).
      ddof: taken from the number of answers in the variance.
      epsilon: added to the deviation.
    """
    centred, count = _centred(rewards, real)
    if scaled:
        freedom = jnp.where(count > ddof, count - ddof, 1)
        variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / freedom
        centred = centred / (jnp.sqrt(variance) + epsilon)
    return jax.lax.stop_gradient(centred)


def reinforce_plus_plus(
    rewards: Float[Array, "prompts samples"], real: Bool[Array, "prompts samples"] | None = None
) -> Float[Array, "prompts samples"]:
    """REINFORCE++ with a baseline: reward less the group's mean, whitened over the whole batch.

    Hu et al. 2025 (arXiv:2501.03262). One deviation, of all answers, so that a prompt whose answers
    are nearly alike is not blown up.
    """
    centred, count = _centred(rewards, real)
    real = jnp.ones(rewards.shape, bool) if real is None else real
    return whiten(centred, real & (count > 1))


def _centred(
    rewards: Float[Array, "prompts samples"], real: Bool[Array, "prompts samples"] | None
) -> tuple[Float[Array, "prompts samples"], Float[Array, "prompts 1"]]:
    """Rewards less the mean of their group, 0 in groups of one, and the answers of each group."""
    real = jnp.ones(rewards.shape, bool) if real is None else real
    count = jnp.sum(real.astype(rewards.dtype), axis=1, keepdims=True)
    mean = jnp.sum(keep(rewards, real), axis=1, keepdims=True) / jnp.where(count > 0, count, 1)
    return jnp.where(real & (count > 1), rewards - mean, 0), count
