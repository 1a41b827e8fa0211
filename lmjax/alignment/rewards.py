"""Rewards of the tokens of answers."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from lmjax.alignment.masks import keep, last_real, require_shape, spread


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
