"""Log-probabilities of tokens that were written, from hidden states, without all the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.alignment.masks import keep
from lmjax.config import UserError
from lmjax.models.transformer import Transformer
from lmjax.objectives.prediction import head_factors
from pallas_kernels.cross_entropy import cross_entropy


def log_probabilities(
    model: Transformer,
    hidden: Float[Array, "batch seq width"],
    tokens: Int[Array, "batch seq"],
    temperature: float = 1.0,
) -> Float[Array, "batch seq"]:
    """Log-probability in nats of each token under softmax(logits / temperature), float32.

    A sampler that also cuts the distribution (top-k, top-p, min-p, penalties) draws from another
    one: log-probabilities to compare with these must be computed here too, not be the sampler's.

    Args:
      model: gives its head.
      hidden: output of the model's last layer.
      tokens: the token that each position predicts, as in `TokenTargets`.
      temperature: above 0; that of sampling.

    Raises:
      UserError: for another temperature.
    """
    return -_terms(model, hidden, tokens, temperature, entropy=False)[0]


def log_probabilities_and_entropy(
    model: Transformer,
    hidden: Float[Array, "batch seq width"],
    tokens: Int[Array, "batch seq"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """`log_probabilities`, and the entropy in nats of the distribution at each position.

    The entropy has gradients; it is that of the whole distribution, not an estimate from the token.
    """
    nll, log_z, mean_logit = _terms(model, hidden, tokens, temperature, entropy=True)
    return -nll, log_z - mean_logit


def _terms(model, hidden, tokens, temperature: float, entropy: bool):
    """Terms of `cross_entropy` for the logits over the temperature."""
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be above 0")
    softcap = model.config.logit_softcap
    with jax.named_scope("head"):
        return cross_entropy(
            *head_factors(model, hidden),
            tokens,
            vocabulary=model.config.vocab_size,
            # c tanh(z / c) over T is c' tanh(z' / c') with c' = c / T and z' = z / T.
            scale=1 / temperature,
            softcap=None if softcap is None else softcap / temperature,
            mean=entropy,
        )


def sum_segments(
    log_probs: Float[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    segments: Int[Array, "rows seq"],
    count: int,
) -> Float[Array, "rows count"]:
    """Log-probability of the answer in each segment of packed rows.

    Args:
      log_probs: of the target at each position.
      mask: true where the target is a token of an answer.
      segments: number of the segment that each target is of, from 1.
      count: most segments of a row; those that a row lacks have 0.
    """
    own = segments[:, None, :] == jnp.arange(1, count + 1)[:, None]
    return jnp.sum(jnp.where(own, keep(log_probs, mask)[:, None, :], 0), axis=2)
