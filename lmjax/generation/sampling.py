"""Sampling: the choice of the next token from the model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lmjax.config import UserError, config


@config
class Sampling:
    """Choice of the next token: repetition_penalty, temperature, top_k, top_p, then min_p."""

    temperature: float = 1.0  # logits are divided by it; 0: always the most likely token
    top_k: int | None = None  # choose among so many of the most likely tokens; none: among all
    # choose among the fewest most likely tokens that hold this share of probability; none: among
    # all (Holtzman et al. 2020, arXiv:1904.09751)
    top_p: float | None = None
    # leave out tokens of less than this share of the most likely one's probability; none: keep
    # all (Nguyen et al. 2024, arXiv:2407.01082)
    min_p: float | None = None
    # logits of tokens that the prompt or the text has are divided by it, negative ones multiplied;
    # 1: as they are (Keskar et al. 2019, arXiv:1909.05858)
    repetition_penalty: float = 1.0
    seed: int = 0  # of the random numbers; each row of a batch has the next one

    def validate(self) -> None:
        """Raise UserError for settings that leave nothing to choose from."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be 1 or more, or none for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: a share of probability lies above 0, at most 1")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: a share of probability lies above 0, at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty={self.repetition_penalty}: must be above 0")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed}: must be from 0 to 2147483647")

    def arguments(self, stop_tokens: Sequence[int]) -> dict[str, Any]:
        """Arguments of the compiled functions; changing them does not recompile."""
        greedy, penalty = self.temperature == 0, self.repetition_penalty
        return {
            "stop_tokens": np.array(list(stop_tokens), np.int32),
            "repetition_penalty": None if penalty == 1 else np.float32(penalty),
            "temperature": None if greedy else np.float32(self.temperature),
            "top_p": None if greedy or self.top_p is None else np.float32(self.top_p),
            "min_p": None if greedy or self.min_p is None else np.float32(self.min_p),
            "top_k": None if greedy else self.top_k,
            "greedy": greedy,
        }


def penalised(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    penalty: Float[Array, ""] | Float[Array, "batch 1"],
) -> Float[Array, "batch vocab"]:
    """Logits with those of seen tokens made less likely (Keskar et al. 2019, section 4.1).

    A negative logit is multiplied where a positive one is divided, as every implementation has it;
    the paper's division alone would reward a token for having a negative one.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, "batch"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None,
    min_p: Float[Array, ""] | None,
    top_k: int | None,
) -> Int[Array, "batch"]:
    """Draws a token of each row, by the Gumbel trick; arrays are local.

    Args:
      logits: of the real vocabulary, without its padding.
      keys: one a row, so that a row's token depends on nothing else in the batch.
      temperature: above 0.
      top_p: share of probability to choose from, within the `top_k`.
      min_p: least probability, as a share of that of the most likely token.
      top_k: number of tokens to choose from.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    logits = (logits - best) / temperature  # at most 0: no temperature is too small
    tokens = None
    if top_k is not None or top_p is not None:
        logits, tokens = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first is always kept, whatever rounding does to `before`.
        kept = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
        logits = jnp.where(kept, logits, -jnp.inf)
    if min_p is not None:
        logits = jnp.where(logits >= jnp.log(min_p), logits, -jnp.inf)  # the best one's is 0
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    choice = first_largest(logits + noise)
    if tokens is not None:
        choice = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return choice.astype(jnp.int32)


def first_largest(x: Float[Array, "*rows columns"]) -> Int[Array, "*rows"]:
    """Index of the first of the largest numbers of each row; where it is NaN, any.

    By two reductions that XLA makes fast on CPUs: `argmax` takes seven times as long there.
    """
    columns = x.shape[-1]
    is_largest = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(columns), columns - 1), axis=-1)
