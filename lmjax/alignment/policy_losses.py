"""Losses of policy gradients, token by token, and the means that they are taken in."""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.alignment.kl import LARGEST_LOG_RATIO, k3
from lmjax.alignment.masks import keep, require_shape
from lmjax.config import UserError, config
from lmjax.objectives.prediction import Sums

MOST = 16  # answers of a row


@config
class TokenAverage(abc.ABC):
    """Base of the ways to average the losses of tokens over a batch of answers."""

    @abc.abstractmethod
    def shares(
        self, mask: Bool[Array, "rows seq"], segments: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq"]:
        """Weight of each token's loss in the average. An answer without real tokens has no part.

        Args:
          mask: real tokens, of the whole batch.
          segments: number of the answer in its row, from 1; 0 is padding.
        """

    def weights(
        self, mask: Bool[Array, "rows seq"], segments: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq"]:
        """`shares` times the number of real tokens.

        Summed losses are so divided by one number, the tokens, whatever the average and whatever
        microbatches they are summed in, and metrics beside them are means over tokens.
        """
        return self.shares(mask, segments) * jnp.sum(mask.astype(jnp.float32))


@config
class TokenMean(TokenAverage):
    """All tokens alike: DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 8), and PPO."""

    def shares(
        self, mask: Bool[Array, "rows seq"], segments: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq"]:
        """One over the tokens of the batch."""
        tokens = jnp.sum(mask.astype(jnp.float32))
        return mask / jnp.where(tokens > 0, tokens, 1)


@config
class AnswerMean(TokenAverage):
    """All answers alike, and all tokens of an answer: GRPO (Shao et al. 2024, eq. 3).

    The tokens of long answers count less.
    """

    def shares(
        self, mask: Bool[Array, "rows seq"], segments: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq"]:
        """One over the tokens of the answer, over the answers of the batch."""
        lengths = _lengths(mask, segments)
        own = jnp.sum(jnp.where(_slots(segments), lengths[..., None], 0), axis=1)
        return mask / jnp.where(own > 0, own, 1) / _answers(lengths)


@config
class FixedLengthMean(TokenAverage):
    """All tokens alike, over the same length for each answer: Dr. GRPO (Liu et al. 2025)."""

    length: int  # tokens that each answer is divided by, as the most that are generated

    def validate(self) -> None:
        """Raises UserError for a length below 1."""
        if self.length < 1:
            raise UserError(f"length={self.length}: must be 1 or more")

    def shares(
        self, mask: Bool[Array, "rows seq"], segments: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq"]:
        """One over the length, over the answers of the batch."""
        return mask / self.length / _answers(_lengths(mask, segments))


def _slots(segments: Int[Array, "rows seq"]) -> Bool[Array, "rows slots seq"]:
    """Marks the tokens of each answer of a row."""
    return segments[:, None, :] == jnp.arange(1, MOST + 1)[:, None]


def _lengths(
    mask: Bool[Array, "rows seq"], segments: Int[Array, "rows seq"]
) -> Float[Array, "rows slots"]:
    """Real tokens of each answer."""
    return jnp.sum((_slots(segments) & mask[:, None, :]).astype(jnp.float32), axis=2)


def _answers(lengths: Float[Array, "rows slots"]) -> Float[Array, ""]:
    """Answers with real tokens, at least 1."""
    count = jnp.sum((lengths > 0).astype(jnp.float32))
    return jnp.where(count > 0, count, 1)


def clipped_policy_losses(
    log_probs: Float[Array, "rows seq"],
    old_log_probs: Float[Array, "rows seq"],
    advantages: Float[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Float[Array, "rows seq"], dict[str, Float[Array, "rows seq"]]]:
    """PPO's loss of each token: -min(r A, clip(r, 1 - clip, 1 + clip_high) A).

    r is policy / old policy (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Args:
      log_probs: of the policy that is trained.
      old_log_probs: of the policy that sampled, at the same temperature.
      advantages: of each token; see `lmjax.alignment.advantages` and `spread`.
      mask: tokens that the policy wrote; losses of the others are 0.
      clip: how far the ratio may fall.
      clip_high: how far it may rise, None: as far (DAPO: 0.28).
      dual_clip: at a negative advantage the loss is at most -dual_clip A (Ye et al. 2020,
        arXiv:1912.09729: 3); None: without bound.

    Returns:
      Losses, and metrics of each token: "clip_fraction", 1 where the clipped term was chosen, and
      "approximate_kl", k3 of KL(old policy | policy).
    """
    for name, array in {"old_log_probs": old_log_probs, "advantages": advantages}.items():
        require_shape(name, array, log_probs.shape)
    old_log_probs, advantages = jax.lax.stop_gradient((old_log_probs, advantages))
    log_probs, old_log_probs, advantages = (
        keep(a, mask) for a in (log_probs, old_log_probs, advantages)
    )
    log_ratio = jnp.clip(log_probs - old_log_probs, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    plain, clipped = -ratio * advantages, -bounded * advantages
    losses = jnp.maximum(plain, clipped)
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -dual_clip * advantages), losses)
    metrics = {
        "clip_fraction": (clipped > plain).astype(losses.dtype),
        "approximate_kl": k3(old_log_probs, log_probs),
    }
    return losses, jax.lax.stop_gradient(metrics)


def clipped_value_sums(
    values: Float[Array, "rows seq"],
    old_values: Float[Array, "rows seq"],
    returns: Float[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    clip: float | None = 0.2,
) -> Sums:
    """Loss of a critic: half the squared error, at least that of a value near the old one.

    max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 of each token.

    Args:
      values: of the critic that is trained.
      old_values: of the critic when the advantages were made.
      returns: what the values should be.
      mask: tokens that the policy wrote.
      clip: how far a value may move; None: without bound.

    Returns:
      Sums over tokens; `extra` has "value_clip_fraction" and "value_error", the squared error.
    """
    for name, array in {"old_values": old_values, "returns": returns}.items():
        require_shape(name, array, values.shape)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    values, old_values, returns = (keep(a, mask) for a in (values, old_values, returns))
    plain = jnp.square(values - returns)
    near = plain
    if clip is not None:
        near = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    extra = {
        "value_clip_fraction": jnp.sum((near > plain).astype(values.dtype)),
        "value_error": jnp.sum(plain),
    }
    loss = jnp.sum(jnp.maximum(plain, near)) / 2
    return Sums(loss, jnp.sum(mask.astype(values.dtype)), jax.lax.stop_gradient(extra))
