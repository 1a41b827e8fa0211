"""Divergence from a reference policy, estimated from the tokens that were sampled, and its price.

The estimators are those of Schulman, "Approximating KL divergence" (2020), for samples of the
policy. As values k1 and k3 are unbiased, and k3 has less variance. Their gradients differ: only
that of k2 is the gradient of KL(policy | reference); k1's is 0 in expectation, and k3's is that of
KL(reference | policy).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmjax.config import UserError, config

# Exponents are limited: beyond it a token's ratio is wrong anyhow, and exp must not overflow.
LARGEST_LOG_RATIO = 20.0


def k1(
    log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """log(policy / reference) of each sampled token, which may be negative."""
    return log_probs - reference


def k2(
    log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Half the square of log(policy / reference)."""
    return jnp.square(log_probs - reference) / 2


def k3(
    log_probs: Float[Array, "*shape"], reference: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """reference / policy - 1 - log(reference / policy), never negative.

    The log-ratio is limited to 20 either way.
    """
    x = jnp.clip(reference - log_probs, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    # exp(x) - 1 would lose all digits of a small x; what rounding still leaves below 0 is cut.
    return jnp.maximum(jnp.expm1(x) - x, 0)


Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS: dict[Estimator, Callable] = {"k1": k1, "k2": k2, "k3": k3}


@config
class KLControl(abc.ABC):
    """Base of the rules that set beta, the price of a nat of divergence in the reward."""

    beta: float = 0.02  # at the start (InstructGPT 0.02; LLaMA 2 0.01, from 34B on 0.005)
    # estimate of the divergence of a token; k1 is that of InstructGPT, and its expected gradient in
    # the reward is the gradient of the divergence
    estimator: Estimator = "k1"

    def validate(self) -> None:
        """Raises UserError for a beta below 0."""
        if self.beta < 0:
            raise UserError(f"beta={self.beta}: must be 0 or more")

    @abc.abstractmethod
    def update(
        self, beta: Float[Array, ""], kl: Float[Array, ""], episodes: int
    ) -> Float[Array, ""]:
        """The next beta.

        Args:
          beta: the last one.
          kl: mean divergence of the last batch in nats, each answer's summed over its tokens.
          episodes: answers of the batch.
        """


@config
class FixedKL(KLControl):
    """The same price at every step."""

    def update(
        self, beta: Float[Array, ""], kl: Float[Array, ""], episodes: int
    ) -> Float[Array, ""]:
        """The beta that it is given."""
        return beta


@config
class AdaptiveKL(KLControl):
    """Moves beta in proportion to the distance from a target (Ziegler et al. 2019, section 2.2)."""

    target: float = 6.0  # nats of an answer
    horizon: float = 10_000  # episodes in which an error of 20% changes beta by a factor of 1.2

    def validate(self) -> None:
        """Raises UserError for a target or horizon that is not above 0."""
        super().validate()
        for name in ("target", "horizon"):
            if (value := getattr(self, name)) <= 0:
                raise UserError(f"{name}={value}: must be above 0")

    def update(
        self, beta: Float[Array, ""], kl: Float[Array, ""], episodes: int
    ) -> Float[Array, ""]:
        """beta (1 + error episodes / horizon), with the error limited to 20%."""
        error = jnp.clip(kl / self.target - 1, -0.2, 0.2)
        return beta * (1 + error * episodes / self.horizon)


@config
class FallingKL(KLControl):
    """Multiplies beta by the same factor at each step, down to a last one."""

    final: float = 0.005  # the last beta (Baichuan 2: from 0.2 to 0.005)
    steps: int = 350  # after which it is reached

    def validate(self) -> None:
        """Raises UserError for a beta that does not fall, or in no step."""
        super().validate()
        if not 0 < self.final <= self.beta:
            raise UserError(f"final={self.final}: must be above 0, and at most beta={self.beta}")
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: must be at least 1")

    def update(
        self, beta: Float[Array, ""], kl: Float[Array, ""], episodes: int
    ) -> Float[Array, ""]:
        """beta times the factor, at least `final`."""
        factor = (self.final / self.beta) ** (1 / self.steps)
        return jnp.maximum(beta * factor, self.final)
