"""Losses that train a policy on preferences directly, without a reward model."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmjax.alignment.masks import keep, require_shape
from lmjax.config import UserError, config
from lmjax.objectives.prediction import Sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers as the losses of preferences read them.

    Attributes:
      log_probs: log-probability of each answer under the policy, summed over its tokens.
      lengths: number of those tokens; 0: there is no answer, and nothing is read of it.
      reference: log-probability under the reference policy; None for losses without one.
    """

    log_probs: Float[Array, "answers"]
    lengths: Float[Array, "answers"]
    reference: Float[Array, "answers"] | None = None

    @property
    def real(self) -> Bool[Array, "answers"]:
        """Returns whether there is an answer; UserError if the arrays differ in shape."""
        for name in ("lengths", "reference"):
            if (array := getattr(self, name)) is not None:
                require_shape(name, array, self.log_probs.shape)
        return self.lengths > 0

    def within(self, real: Bool[Array, "answers"]) -> Answers:
        """The answers with harmless numbers in those that are not real."""
        reference = self.reference if self.reference is None else keep(self.reference, real)
        return Answers(
            jnp.where(real, self.log_probs, -1.0), jnp.where(real, self.lengths, 1.0), reference
        )

    @property
    def log_ratio(self) -> Float[Array, "answers"]:
        """log(policy / reference); no gradient passes to the reference."""
        if self.reference is None:
            raise UserError(
                "the loss compares with a reference policy; its log-probabilities are missing"
            )
        return self.log_probs - jax.lax.stop_gradient(self.reference)

    @property
    def mean_log_prob(self) -> Float[Array, "answers"]:
        """Log-probability of a token of each answer, on average."""
        return self.log_probs / self.lengths


@config
class PreferenceLoss(abc.ABC):
    """Base of the losses of pairs of a better and a worse answer."""

    reads_reference: ClassVar[bool] = True  # `Answers.reference` is needed

    @abc.abstractmethod
    def rewards(self, answers: Answers) -> Float[Array, "answers"]:
        """The reward that the policy gives each answer by its log-probability."""

    @abc.abstractmethod
    def losses(self, chosen: Answers, rejected: Answers) -> Float[Array, "answers"]:
        """Loss of each pair; both answers are real."""

    def sums(self, chosen: Answers, rejected: Answers) -> Sums:
        """Sums over the pairs of which both answers are real.

        `extra` has "accuracy", the pairs in which the chosen answer has the higher reward, and
        "margin", "chosen_reward" and "rejected_reward".

        Raises:
          UserError: the numbers of answers differ, or a reference is needed and not given.
        """
        require_shape("rejected.log_probs", rejected.log_probs, chosen.log_probs.shape)
        real = chosen.real & rejected.real
        chosen, rejected = chosen.within(real), rejected.within(real)
        better, worse = jax.lax.stop_gradient((self.rewards(chosen), self.rewards(rejected)))
        metrics = {
            "accuracy": (better > worse).astype(better.dtype),
            "margin": better - worse,
            "chosen_reward": better,
            "rejected_reward": worse,
        }
        return Sums(
            jnp.sum(keep(self.losses(chosen, rejected), real)),
            jnp.sum(real.astype(jnp.float32)),
            {name: jnp.sum(keep(values, real)) for name, values in metrics.items()},
        )


@config
class DPO(PreferenceLoss):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""

    beta: float = 0.1  # how strongly the policy is held to the reference
    label_smoothing: float = 0.0  # share of pairs that are labelled wrongly (conservative DPO)

    def validate(self) -> None:
        """Raises UserError for a beta not above 0, or a smoothing not in 0 to 0.5."""
        require_positive(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing}: must be 0 or more, under 0.5")

    def rewards(self, answers: Answers) -> Float[Array, "answers"]:
        """beta log(policy / reference)."""
        return self.beta * answers.log_ratio

    def losses(self, chosen: Answers, rejected: Answers) -> Float[Array, "answers"]:
        """-log sigmoid(margin); smoothed, of both labels (Mitchell 2023, eq. 3)."""
        margin = self.rewards(chosen) - self.rewards(rejected)
        right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


@config
class HingeDPO(PreferenceLoss):
    """DPO with the hinge loss of SLiC (Zhao et al. 2023, arXiv:2305.10425)."""

    beta: float = 0.1  # a log-ratio of 1/beta between the answers is enough

    def validate(self) -> None:
        """Raises UserError for a beta not above 0."""
        require_positive(self, "beta")

    def rewards(self, answers: Answers) -> Float[Array, "answers"]:
        """beta log(policy / reference)."""
        return self.beta * answers.log_ratio

    def losses(self, chosen: Answers, rejected: Answers) -> Float[Array, "answers"]:
        """max(0, 1 - margin)."""
        return jax.nn.relu(1 - (self.rewards(chosen) - self.rewards(rejected)))


@config
class IPO(PreferenceLoss):
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Log-ratios are averaged over the tokens of an answer. The paper does not say so; its authors do,
    for the experiments in it (as in TRL).
    """

    beta: float = 0.1  # tau of the paper: log-ratios of a token should differ by 1 / (2 beta)

    def validate(self) -> None:
        """Raises UserError for a beta not above 0."""
        require_positive(self, "beta")

    def rewards(self, answers: Answers) -> Float[Array, "answers"]:
        """log(policy / reference) of a token, on average."""
        return answers.log_ratio / answers.lengths

    def losses(self, chosen: Answers, rejected: Answers) -> Float[Array, "answers"]:
        """(margin - 1 / (2 beta))^2."""
        margin = self.rewards(chosen) - self.rewards(rejected)
        return jnp.square(margin - 1 / (2 * self.beta))


@config
class SimPO(PreferenceLoss):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, eq. 6): no reference."""

    reads_reference: ClassVar[bool] = False

    beta: float = 2.0  # factor of the mean log-probability of a token
    gamma: float = 1.0  # margin by which the chosen answer's reward should be higher

    def validate(self) -> None:
        """Raises UserError for a beta not above 0."""
        require_positive(self, "beta")

    def rewards(self, answers: Answers) -> Float[Array, "answers"]:
        """beta times the mean log-probability of a token."""
        return self.beta * answers.mean_log_prob

    def losses(self, chosen: Answers, rejected: Answers) -> Float[Array, "answers"]:
        """-log sigmoid(margin - gamma)."""
        margin = self.rewards(chosen) - self.rewards(rejected)
        return -jax.nn.log_sigmoid(margin - self.gamma)


@config
class ORPO(PreferenceLoss):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7).

    The chosen answers are learnt as in supervised finetuning, so there is no reference.
    """

    reads_reference: ClassVar[bool] = False

    weight: float = 0.1  # lambda: of the odds ratio beside the chosen answers' cross-entropy

    def validate(self) -> None:
        """Raises UserError for a weight not above 0."""
        require_positive(self, "weight")

    def rewards(self, answers: Answers) -> Float[Array, "answers"]:
        """Log of the odds p / (1 - p), with p the geometric mean of the tokens' probabilities."""
        # Odds of certainty are infinite.
        log_p = jnp.minimum(answers.mean_log_prob, -1e-6)
        return log_p - jnp.log(-jnp.expm1(log_p))

    def losses(self, chosen: Answers, rejected: Answers) -> Float[Array, "answers"]:
        """Cross-entropy of a token of the chosen answer, and weight times the odds ratio's loss."""
        margin = self.rewards(chosen) - self.rewards(rejected)
        return -chosen.mean_log_prob - self.weight * jax.nn.log_sigmoid(margin)


@config
class KTO:
    """Kahneman-Tversky optimisation of single answers (Ethayarajh et al. 2024, 2402.01306).

    The objective that trains with it is `LabelledAnswers`.
    """

    beta: float = 0.1  # how strongly the policy is held to the reference
    desirable: float = 1.0  # weight of answers that are wanted
    undesirable: float = 1.0  # weight of the others

    def validate(self) -> None:
        """Raises UserError for a number that is not above 0."""
        require_positive(self, "beta", "desirable", "undesirable")

    def sums(self, answers: Answers, wanted: Bool[Array, "answers"], kl: Float[Array, ""]) -> Sums:
        """Sums over the answers: desirable (1 - sigmoid(beta (log-ratio - kl))) of those wanted.

        Of the others: undesirable (1 - sigmoid(beta (kl - log-ratio))).

        `extra` has "reward", beta times the log-ratio, of each answer that is wanted less that of
        each that is not, and "kl".

        Args:
          answers: with their reference.
          wanted: answers that are desirable.
          kl: of the whole batch; see `kto_divergence`. No gradient passes through it.
        """
        require_shape("wanted", wanted, answers.log_probs.shape)
        real = answers.real
        log_ratio, kl = answers.within(real).log_ratio, jax.lax.stop_gradient(kl)
        sign = jnp.where(wanted, 1.0, -1.0)
        weight = jnp.where(wanted, self.desirable, self.undesirable)
        # 1 - sigmoid(x) is sigmoid(-x), without the cancellation.
        losses = weight * jax.nn.sigmoid(-self.beta * sign * (log_ratio - kl))
        count = jnp.sum(real.astype(jnp.float32))
        reward = jax.lax.stop_gradient(self.beta * sign * log_ratio)
        extra = {"reward": jnp.sum(keep(reward, real)), "kl": kl * count}
        return Sums(jnp.sum(keep(losses, real)), count, extra)


def kto_divergence(answers: Answers) -> Float[Array, ""]:
    """KL(policy | reference) for `KTO`: the mean log-ratio of mismatched answers, at least 0.

    Args:
      answers: of the whole batch, each to another's prompt (the paper's z_0). It must be known
        before the batch is divided into microbatches.
    """
    return divergence_of(log_ratio_sums(answers))


def divergence_of(sums: Sums) -> Float[Array, ""]:
    """Divergence of sums of log-ratios: their mean, at least 0; no gradient passes through it."""
    mean = sums.loss / jnp.where(sums.weight > 0, sums.weight, 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def log_ratio_sums(answers: Answers) -> Sums:
    """Sum of log(policy / reference) over the answers that are real, and their number."""
    real = answers.real
    log_ratio = keep(answers.within(real).log_ratio, real)
    return Sums(jnp.sum(log_ratio), jnp.sum(real.astype(log_ratio.dtype)), {})


def require_positive(loss: PreferenceLoss | KTO, *names: str) -> None:
    """Raises UserError for a field that is not above 0."""
    for name in names:
        if (value := getattr(loss, name)) <= 0:
            raise UserError(f"{name}={value}: must be above 0")
