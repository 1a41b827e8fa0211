"""Policy gradients as an objective: what the learner minimises on answers of a policy."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from lmjax.alignment.kl import ESTIMATORS, k3
from lmjax.alignment.log_probabilities import log_probabilities_and_entropy
from lmjax.alignment.masks import keep
from lmjax.alignment.policy_losses import (
    TokenAverage,
    TokenMean,
    clipped_policy_losses,
    clipped_value_sums,
)
from lmjax.config import UserError, config
from lmjax.models.batch import Array as AnyArray
from lmjax.models.batch import Batch
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.compatibility import require_causal
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.objective import Objective
from lmjax.objectives.prediction import Sums

VALUE = "value"  # name of the head of a critic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTargets:
    """Answers that a policy wrote, with what was found out about them since.

    Attributes:
      answers: the next token at each position; the weight is 1 for those that the policy wrote, and
        0 for prompts, padding and what tools wrote. `normalise` of the objective makes other
        weights of them.
      log_probs: of those tokens under the policy that sampled, computed as the objective computes
        them: by `log_probabilities` at the temperature of sampling. None: that policy is the one
        that is trained, so that the ratio is 1.
      advantages: of those tokens.
      reference: log-probabilities under the reference policy; None where the loss has no such term.
      values: of the critic when the advantages were made; None where there is no critic.
      returns: what its values should be.
      sampled: log-probabilities as the sampler itself gave them, for a metric; None: unknown.
    """

    answers: TokenTargets
    log_probs: Float[AnyArray, "*batch seq"] | None
    advantages: Float[AnyArray, "*batch seq"]
    reference: Float[AnyArray, "*batch seq"] | None = None
    values: Float[AnyArray, "*batch seq"] | None = None
    returns: Float[AnyArray, "*batch seq"] | None = None
    sampled: Float[AnyArray, "*batch seq"] | None = None


@config
class ClippedPolicy(Objective):
    """PPO's policy loss, and that of GRPO and its kin, which differ in their settings alone.

    PPO: GAE's advantages of rewards that have the divergence in them. GRPO: `group_relative`
    advantages, average=AnswerMean, kl=0.04. DAPO: clip_high=0.28. Dr. GRPO: `scaled=False`,
    average=FixedLengthMean.

    PPO-ptx, which also learns from pretraining text (Ouyang et al. 2022, eq. 2), is the sum

        WeightedSum(objectives=(ClippedPolicy(), CausalLM()), weights=(1.0, 27.8))

    of which an example has the answers and, in inputs and targets of their own, rows of text.

    With `returns` in the targets, a critic learns too: a head of tokens of the policy's own model,
    so that its loss trains the trunk that both read. InstructGPT's critic is a model of its own
    (`ValueNetwork`), and these targets have no `returns` then.

    Dropout is off: with it the policy would differ from the one that sampled before any update.
    """

    clip: float = 0.2  # how far the ratio of probabilities may fall
    clip_high: float | None = None  # how far it may rise; none: as far (DAPO: 0.28)
    dual_clip: float | None = None  # bound at negative advantages, times the advantage; none: no
    average: TokenAverage = TokenMean()  # over the tokens of a batch
    kl: float = 0.0  # weight of the divergence from the reference, in the loss (GRPO: 0.04)
    # estimate of that divergence, by its gradient: k3, of KL(reference | policy) (GRPO); k2, of
    # KL(policy | reference). That of k1 is 0 in expectation
    kl_estimator: Literal["k2", "k3"] = "k3"
    entropy: float = 0.0  # weight of the bonus for the mean entropy of tokens
    value: float = 0.5  # weight of the critic's loss, where there is a critic
    value_clip: float | None = 0.2  # how far a value may move in a step; none: any way
    temperature: float = 1.0  # of sampling

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        if not 0 < self.clip < 1:
            raise UserError(f"clip={self.clip}: must be above 0, and below 1")
        if self.clip_high is not None and self.clip_high <= 0:
            raise UserError(f"clip_high={self.clip_high}: must be above 0, or none")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip={self.dual_clip}: must be above 1, or none")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: must be above 0")
        for name in ("kl", "entropy", "value"):
            if (weight := getattr(self, name)) < 0:
                raise UserError(f"{name}={weight}: must be 0 or more")
        if self.value_clip is not None and self.value_clip <= 0:
            raise UserError(f"value_clip={self.value_clip}: must be above 0, or none")

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an encoder."""
        require_causal(self, model)

    def weight(self, example: Example) -> Float[Array, ""]:
        """Number of tokens that the policy wrote."""
        return jnp.sum(_mask(example.targets).astype(jnp.float32))

    def normalise(self, example: Example) -> Example:
        """The example with each token's weight in the average over all rows."""
        targets, batch = example.targets, example.inputs
        mask, segments = _mask(targets), batch.behind(batch.segments)
        if batch.branches is None:
            weights = self.average.weights(mask, segments)
        else:  # one of which may hold several segments
            apart = mask.size // batch.branches.length, batch.branches.length
            own = (_reshaped(jnp.asarray(a), apart) for a in (mask, segments))
            weights = _reshaped(self.average.weights(*own), mask.shape)
        answers = dataclasses.replace(targets.answers, weights=weights)
        return Example(example.inputs, dataclasses.replace(targets, answers=answers))

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums over the tokens that the policy wrote; see `sums` and `critic_sums`."""
        hidden = target_states(model, example.inputs)
        tokens = example.targets.answers.tokens
        sums = self.sums(
            *log_probabilities_and_entropy(model, hidden, tokens, self.temperature),
            example.targets,
        )
        if example.targets.returns is None:
            return sums
        critic = self.critic_sums(values_of(model, hidden, example.inputs), example.targets)
        loss = sums.loss + self.value * critic.loss
        return Sums(loss, sums.weight, sums.extra | critic.extra)

    def critic_sums(self, values: Float[Array, "rows seq"], targets: SampledTargets) -> Sums:
        """Clipped loss of the critic over the tokens that the policy wrote, each weighing alike.

        `extra` has "value_loss", "value_error" and "value_clip_fraction", as means over tokens.

        Args:
          values: of the critic that is trained.
          targets: with `values` and `returns`.
        """
        old, returns, mask = targets.values, targets.returns, _mask(targets)
        sums = clipped_value_sums(values, old, returns, mask, self.value_clip)
        extra = sums.extra | {"value_loss": jax.lax.stop_gradient(sums.loss)}
        return Sums(sums.loss, sums.weight, extra)

    def sums(
        self,
        log_probs: Float[Array, "rows seq"],
        entropies: Float[Array, "rows seq"],
        targets: SampledTargets,
    ) -> Sums:
        """Policy loss and divergence by the average's weights, less the entropy of tokens.

        `extra` has, as means over tokens, "entropy", "clip_fraction", "approximate_kl" (from the
        policy that sampled), with a reference "kl" (k3, whichever estimate the loss has), and where
        the sampler's numbers are known "sampler_gap", the distance from them; and "policy_loss", as
        it is averaged.

        Args:
          log_probs: of the tokens under the policy that is trained.
          entropies: of its distributions.
          targets: of an example that went through `normalise`.
        """
        mask, weights = _mask(targets), targets.answers.weights
        old = log_probs if targets.log_probs is None else targets.log_probs
        losses, metrics = clipped_policy_losses(
            log_probs,
            old,
            targets.advantages,
            mask,
            clip=self.clip,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        metrics["entropy"] = keep(entropies, mask)
        if targets.sampled is not None:
            metrics["sampler_gap"] = jnp.abs(keep(log_probs, mask) - keep(targets.sampled, mask))
        loss = policy_loss = jnp.sum(losses * weights)
        if targets.reference is not None:
            reference = jax.lax.stop_gradient(keep(targets.reference, mask))
            policy = keep(log_probs, mask)
            metrics["kl"] = k3(policy, reference)
            divergence = ESTIMATORS[self.kl_estimator](policy, reference)
            loss = loss + self.kl * jnp.sum(divergence * weights)
        elif self.kl:
            raise UserError(
                f"kl={self.kl}, and the targets have no log-probabilities of a reference"
            )
        extra = {name: jnp.sum(values) for name, values in metrics.items()}
        loss = loss - self.entropy * extra["entropy"]
        extra["policy_loss"] = policy_loss
        return Sums(loss, jnp.sum(mask.astype(jnp.float32)), jax.lax.stop_gradient(extra))


def target_states(model: Transformer, batch: Batch) -> Float[Array, "rows seq width"]:
    """Hidden states at the positions of targets: where there are branches, at theirs alone."""
    return batch.behind(model(batch)[0])


def values_of(
    model: Transformer, hidden: Float[Array, "rows seq width"], batch: Batch
) -> Float[Array, "rows seq"]:
    """The critic's value at each position: what is to come from the next token on."""
    return model.outputs(VALUE, hidden, batch)[..., 0]


def _mask(targets: SampledTargets) -> Bool[Array, "rows seq"]:
    """Marks the tokens that the policy wrote."""
    return jnp.asarray(targets.answers.weights) > 0


def _reshaped(a: Shaped[Array, "rows seq"], shape: tuple[int, ...]) -> Shaped[Array, "more less"]:
    """The array in another shape, its first axis divided among devices as before."""
    rows = jax.typeof(a).sharding.spec[0]
    return jax.lax.reshape(a, shape, out_sharding=PartitionSpec(rows, None))
