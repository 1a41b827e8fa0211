"""Soft caps on scores and logits (Gemma Team 2024, arXiv:2408.00118, section 2)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def softcap_scores(
    scores: Float[Array, "..."], softcap: float | None
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """softcap tanh(scores / softcap) and its derivative; scores and None without a softcap."""
    if softcap is None:
        return scores, None
    bent = jnp.tanh(scores / softcap)
    return softcap * bent, 1 - jnp.square(bent)
