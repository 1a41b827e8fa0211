"""Loss of a reward model: the better of two answers should have the higher score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.alignment.masks import keep, require_shape
from lmjax.objectives.prediction import Sums


def ranking_loss(
    scores: Float[Array, "prompts answers"],
    ranks: Int[Array, "prompts answers"],
    real: Bool[Array, "prompts answers"] | None = None,
    margins: Float[Array, "prompts answers answers"] | None = None,
    centring: float = 0.0,
) -> Sums:
    """Bradley-Terry loss of all pairs of a prompt's ranked answers (Ouyang et al. 2022, eq. 1).

    The mean over a prompt's pairs of -log sigmoid(s_better - s_worse - margin), summed over the
    prompts. All answers to a prompt are one element, since each of them is in several pairs. Equal
    ranks are no pair; a prompt without pairs has no weight.

    Args:
      scores: of the reward model, one an answer.
      ranks: of the answers, the best the lowest; compared within a prompt alone.
      real: answers that exist, where prompts have different numbers of them; None: all.
      margins: by which the first answer (axis 1) should exceed the second (axis 2); read where it
        is the better one.
      centring: weight of (s_better + s_worse)^2, which keeps scores around 0 (Eisenstein et al.
        2023, arXiv:2312.09244).

    Returns:
      Sums by prompts; `extra` has "accuracy", and "margin", the mean lead of the better answer.

    Raises:
      UserError: a shape differs from those above, even if it could be broadcast.
    """
    prompts, answers = scores.shape
    require_shape("ranks", ranks, (prompts, answers))
    real = jnp.ones_like(ranks, bool) if real is None else real
    require_shape("real", real, (prompts, answers))
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & real[:, :, None] & real[:, None, :]
    scores = keep(scores, real)
    lead = scores[:, :, None] - scores[:, None, :]
    wanted = lead
    if margins is not None:
        require_shape("margins", margins, (prompts, answers, answers))
        wanted = lead - keep(margins, pairs)
    losses = -jax.nn.log_sigmoid(wanted)
    if centring:
        losses = losses + centring * jnp.square(scores[:, :, None] + scores[:, None, :])
    count = jnp.sum(pairs.astype(scores.dtype), axis=(1, 2))

    def total(values):
        """Sum over prompts of the mean over pairs."""
        return jnp.sum(jnp.sum(keep(values, pairs), axis=(1, 2)) / jnp.where(count > 0, count, 1))

    extra = {"accuracy": total((lead > 0).astype(scores.dtype)), "margin": total(lead)}
    extra = {name: jax.lax.stop_gradient(value) for name, value in extra.items()}
    return Sums(total(losses), jnp.sum((count > 0).astype(scores.dtype)), extra)
