"""The choice of next tokens where each row of a batch has settings of its own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmjax.generation.sampling import first_largest, penalised

MOST_TOPS = 20  # most likely tokens that can be asked for beside the chosen one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Settings of the choice, a number for each row.

    Attributes:
      temperature: 0: the most likely token.
      top_k: the vocabulary's size where there is none.
      top_p: 1 where there is none.
      min_p: 0 where there is none.
      ranked: whether the row has a top_k or a top_p: then it draws in the order of likelihood, as
        `lmjax.generation.sampling.choose` does.
      seeds, counts: source of randomness, and how many tokens were drawn from it before.
    """

    temperature: Float[np.ndarray | Array, "rows"]
    top_k: Int[np.ndarray | Array, "rows"]
    top_p: Float[np.ndarray | Array, "rows"]
    min_p: Float[np.ndarray | Array, "rows"]
    ranked: Bool[np.ndarray | Array, "rows"]
    seeds: UInt32[np.ndarray | Array, "rows"]
    counts: Int[np.ndarray | Array, "rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """Changes of logits before the choice.

    Attributes:
      repetition: penalty of each row for tokens that it has; see `penalised`.
      seen: these tokens.
      bias: added afterwards: a request's logit_bias, its penalties for tokens that it has written,
        and minus infinity for tokens that its grammar does not allow.
    """

    repetition: Float[np.ndarray | Array, "rows"]
    seen: Bool[np.ndarray | Array, "rows vocab"]
    bias: Float[np.ndarray | Array, "rows vocab"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """The tokens that were chosen.

    Attributes:
      tokens: one a row.
      log_probabilities: of these, in the model's own distribution, as in `Continuation`.
      top_tokens, top_log_probabilities: the most likely tokens; None where nobody asks.
    """

    tokens: Int[Array, "rows"]
    log_probabilities: Float[Array, "rows"]
    top_tokens: Int[Array, "rows tops"] | None
    top_log_probabilities: Float[Array, "rows tops"] | None


@functools.partial(jax.jit, static_argnames=("ranked", "tops"))
def choose_rows(
    logits: Float[Array, "rows vocab"],
    settings: RowSettings | None,
    adjustments: Adjustments | None,
    *,
    ranked: bool,
    tops: bool,
) -> Chosen:
    """Chooses a token for each row; a row's token depends on that row alone.

    Args:
      logits: of the real vocabulary.
      settings: of each row; None: all take the most likely token.
      adjustments: None: of none.
      ranked: some row has a top_k or a top_p.
      tops: tell the most likely tokens too.
    """
    wanted = logits
    if adjustments is not None:
        wanted = penalised(logits, adjustments.seen, adjustments.repetition[:, None])
        wanted = wanted + adjustments.bias
    tokens = first_largest(wanted)
    if settings is not None:
        tokens = jnp.where(settings.temperature > 0, _drawn(wanted, settings, ranked), tokens)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = (jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total)[:, 0]
    if not tops:
        return Chosen(tokens, chosen, None, None)
    best, their_tokens = jax.lax.top_k(logits, min(MOST_TOPS, logits.shape[-1]))
    return Chosen(tokens, chosen, their_tokens, best - total)


def _drawn(
    logits: Float[Array, "rows vocab"], settings: RowSettings, ranked: bool
) -> Int[Array, "rows"]:
    """Tokens drawn by the Gumbel trick; see `lmjax.generation.sampling.choose`."""
    size = logits.shape[-1]
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(
        settings.seeds, settings.counts
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    least = jnp.log(settings.min_p)[:, None]  # the best one's logit is 0
    plain = first_largest(jnp.where(scaled >= least, scaled, -jnp.inf) + noise)
    if not ranked:
        return plain
    rank = jnp.arange(size)
    scaled, tokens = jax.lax.top_k(scaled, size)
    scaled = jnp.where(rank < settings.top_k[:, None], scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < settings.top_p[:, None]) | (rank == 0) | (settings.top_p[:, None] >= 1)
    scaled = jnp.where(kept & (scaled >= least), scaled, -jnp.inf)
    choice = first_largest(scaled + noise)
    by_rank = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return jnp.where(settings.ranked, by_rank, plain)


@jax.jit
def score_tokens(
    logits: Float[Array, "new vocab"], following: Int[Array, "new"]
) -> tuple[Float[Array, "new"], Int[Array, "new tops"], Float[Array, "new tops"]]:
    """Log-probabilities of the tokens that follow, and the most likely ones with theirs."""
    logs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = jnp.take_along_axis(logs, following[:, None], axis=-1)[:, 0]
    best = jax.lax.top_k(logs, min(MOST_TOPS, logs.shape[-1]))
    return scores, best[1], best[0]


@jax.jit
def greedy_tokens(
    logits: Float[Array, "rows new vocab"],
) -> tuple[Int[Array, "rows new"], Float[Array, "rows new"]]:
    """The most likely token after each token, and its log-probability."""
    tokens = first_largest(logits)
    best = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return tokens, best - jax.nn.logsumexp(logits, axis=-1)
