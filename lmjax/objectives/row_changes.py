"""Changes of the tokens of whole rows, with random numbers that no mesh changes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lmjax.models.batch import Batch
from lmjax.parallel.random import draw_rows

Tokens = Int[Array, "batch seq"]


def uniform(key: PRNGKeyArray, like: Array, tiny: bool = False) -> Float[Array, "..."]:
    """Uniform numbers from 0 to 1 of the shape and sharding of an array; with `tiny`, above 0."""
    low = np.finfo(np.float32).tiny if tiny else 0.0
    sharding = jax.typeof(like).sharding
    draw = functools.partial(jax.random.uniform, key, minval=low)
    return draw_rows(draw, like.shape, sharding.spec)


def is_listed(ids: tuple[int, ...], size: int) -> Bool[Array, "size"]:
    """Mask of the ids below `size` that are in a list."""
    return jnp.asarray(np.isin(np.arange(size), ids))


def types_of(batch: Batch) -> Tokens:
    """Number of the text of a pair that each token is of; zeros where there are no pairs."""
    return jnp.zeros_like(batch.tokens) if batch.token_types is None else batch.token_types


def sorted_rows(by: Float[Array, "batch seq"], *columns: Array) -> tuple[Array, ...]:
    """The values `by` in rising order along each row, and the columns in the same order."""
    return jax.lax.sort((by, *columns), dimension=1, is_stable=True, num_keys=1)


def swapped(
    tokens: Tokens, chosen: Bool[Array, "batch seq"], types: Tokens, key: PRNGKeyArray
) -> Tokens:
    """The tokens with those that are chosen in random order among their positions.

    Those of the two texts of a pair stay in their texts.
    """
    size = tokens.shape[1]
    index = jnp.arange(size, dtype=jnp.float32)
    behind = 2.0 * size + index  # what is not chosen, in its order
    draws = uniform(jax.random.fold_in(key, 1), tokens)
    positions, _ = sorted_rows(jnp.where(chosen, index, behind), tokens)
    positions = jnp.where(positions < size, positions, positions - 2.0 * size)
    _, drawn = sorted_rows(jnp.where(chosen, types + draws, behind), tokens)
    return sorted_rows(positions, drawn)[1]


def shortened(batch: Batch, left_out: Bool[Array, "batch seq"]) -> Batch:
    """The batch without some tokens; what follows them moves up, and padding fills the end."""
    kept = (batch.segments > 0) & ~left_out
    index = jnp.arange(batch.tokens.shape[1], dtype=jnp.float32)
    order = jnp.where(kept, index, 2.0 * len(index) + index)
    columns = [batch.tokens, batch.segments, types_of(batch)]
    _, *columns = sorted_rows(order, *columns)
    stays = index < jnp.sum(kept, axis=1, keepdims=True)
    tokens, segments, types = (jnp.where(stays, column, 0) for column in columns)
    types = None if batch.token_types is None else types
    return dataclasses.replace(batch, tokens=tokens, segments=segments, token_types=types)
