"""Rewards of answers and of their tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lmjax.alignment.advantages import whiten
from lmjax.alignment.masks import keep, last_real, require_shape, spread

SAFETY_THRESHOLD = 0.15  # of LLaMA 2: finds unsafe answers with precision 0.89, recall 0.55
LARGEST_LOGIT = 13.8  # of a probability of 1 - 1e-6; those of 0 and 1 are infinite


def token_rewards(
    scores: Float[Array, "rows"],
    kl: Float[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    beta: float | Float[Array, ""],
) -> Float[Array, "rows seq"]:
    """-beta times the divergence at each real token, and the answer's score at the last of them.

    Ouyang et al. 2022 (arXiv:2203.02155), section 3.4. A score of 0 is a score; a row without real
    tokens has no reward.

    Args:
      scores: of the reward model.
      kl: divergence from the reference at each token; see `lmjax.alignment.kl`.
      mask: tokens of the answer that the policy wrote.
      beta: price of a nat.
    """
    require_shape("scores", scores, mask.shape[:1])
    return spread(scores, last_real(mask)) - beta * keep(kl, mask)


def gated_rewards(
    helpful: Float[Array, "rows"],
    safety: Float[Array, "rows"],
    safety_prompt: Bool[Array, "rows"],
    real: Bool[Array, "rows"] | None = None,
    threshold: float = SAFETY_THRESHOLD,
) -> Float[Array, "rows"]:
    """The reward of LLaMA 2's two reward models, whitened over the batch.

    R = safety where the prompt is tagged or safety < threshold, else helpful; then
    whiten(logit(R)). Touvron et al. 2023 (arXiv:2307.09288), section 3.2.3. The divergence is
    subtracted after it (`token_rewards`).

    Args:
      helpful, safety: scores as probabilities, the sigmoid of what the models give.
      safety_prompt: prompts that were written to provoke unsafe answers.
      real: rows that hold an answer; None: all.
      threshold: safety below which it alone counts.
    """
    real = jnp.ones_like(safety_prompt) if real is None else real
    # A safety score that is NaN must not give way to the helpful one.
    reward = jnp.where(safety_prompt | ~(safety >= threshold), safety, helpful)
    reward = jnp.where(real, reward, 0.5)
    logit = jnp.clip(jnp.log(reward) - jnp.log1p(-reward), -LARGEST_LOGIT, LARGEST_LOGIT)
    return whiten(logit, real)
