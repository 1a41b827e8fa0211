"""Divergences of a student's predictions from a teacher's, over one vocabulary."""

from __future__ import annotations

import abc
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmjax.config import UserError, config

LogProbabilities = Float[Array, "*rows vocab"]


def kl(one: LogProbabilities, other: LogProbabilities) -> Float[Array, "*rows"]:
    """KL(one || other) in nats over the last axis, of log-probabilities."""
    return jnp.sum(jnp.exp(one) * (one - other), axis=-1)


def mixture(
    one: LogProbabilities, other: LogProbabilities, share: float
) -> Float[Array, "*rows vocab"]:
    """Log-probabilities of share x one + (1 - share) x other."""
    return jnp.logaddexp(one + math.log(share), other + math.log1p(-share))


@config
class Divergence(abc.ABC):
    """Base of the divergences."""

    @abc.abstractmethod
    def __call__(
        self, teacher: LogProbabilities, student: LogProbabilities
    ) -> Float[Array, "*rows"]:
        """Nats of each row; 0 where both say the same."""


@config
class ForwardKL(Divergence):
    """KL(teacher || student): the student covers all that the teacher says (Hinton et al. 2015,
    arXiv:1503.02531)."""

    def __call__(
        self, teacher: LogProbabilities, student: LogProbabilities
    ) -> Float[Array, "*rows"]:
        """See `Divergence.__call__`."""
        return kl(teacher, student)


@config
class ReverseKL(Divergence):
    """KL(student || teacher): the student says nothing that the teacher does not (MiniLLM, Gu et
    al. 2023, arXiv:2306.08543)."""

    def __call__(
        self, teacher: LogProbabilities, student: LogProbabilities
    ) -> Float[Array, "*rows"]:
        """See `Divergence.__call__`."""
        return kl(student, teacher)


@config
class MixtureDivergence(Divergence, abc.ABC):
    """Base of the divergences from a mixture of both."""

    share: float = 0.1  # alpha

    def validate(self) -> None:
        """Raises UserError for a share that leaves nothing of one of both."""
        if not 0 < self.share < 1:
            raise UserError(f"divergence.share={self.share}: must be above 0 and below 1")


@config
class SkewedKL(MixtureDivergence):
    """KL(teacher || share x teacher + (1 - share) x student) (DistiLLM, Ko et al. 2024,
    arXiv:2402.03898, equation 4)."""

    def __call__(
        self, teacher: LogProbabilities, student: LogProbabilities
    ) -> Float[Array, "*rows"]:
        """See `Divergence.__call__`."""
        return kl(teacher, mixture(teacher, student, self.share))


@config
class SkewedReverseKL(MixtureDivergence):
    """KL(student || (1 - share) x teacher + share x student), likewise of DistiLLM."""

    def __call__(
        self, teacher: LogProbabilities, student: LogProbabilities
    ) -> Float[Array, "*rows"]:
        """See `Divergence.__call__`."""
        return kl(student, mixture(student, teacher, self.share))


@config
class JensenShannon(MixtureDivergence):
    """share x KL(teacher || m) + (1 - share) x KL(student || m), m the mixture by these shares
    (GKD, Agarwal et al. 2023, arXiv:2306.13649, equation 1)."""

    share: float = 0.5  # of the teacher, beta

    def __call__(
        self, teacher: LogProbabilities, student: LogProbabilities
    ) -> Float[Array, "*rows"]:
        """See `Divergence.__call__`."""
        mixed = mixture(teacher, student, self.share)
        return self.share * kl(teacher, mixed) + (1 - self.share) * kl(student, mixed)
