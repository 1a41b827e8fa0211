"""An example: inputs of a model, and the targets that its objective compares the output with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError
from lmjax.models.batch import Array, Batch, check_tokens, first_outside


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTargets:
    """The token to predict at each position of the inputs.

    Attributes:
      tokens: token ids; without meaning where the weight is 0.
      weights: weight of each target in the loss; 0 where there is nothing to predict.
    """

    tokens: Int[Array, "*batch seq"]
    weights: Float[Array, "*batch seq"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """One training or evaluation example: a batch of rows with their targets.

    The first axis of every array is the batch's. Arrays are numpy on the host and sharded jax
    arrays on the devices.

    Attributes:
      inputs: a `Batch`, or a pytree of several.
      targets: a pytree of the objective's own type, for most objectives `TokenTargets`.
    """

    inputs: Any
    targets: Any


def count_rows(example: Example) -> int:
    """Rows of the example's first batch."""
    return len(batches(example)[0].tokens)


def count_tokens(example: Example) -> int:
    """Tokens that the model reads, padding included; of an encoder and a decoder the decoder's."""
    return sum(batch.tokens.size for batch in batches(example))


def count_real_tokens(example: Example) -> Float[Array, ""]:
    """Tokens that the model reads, without padding; of an encoder and a decoder the decoder's."""
    return sum(jnp.sum((batch.segments > 0).astype(jnp.float32)) for batch in batches(example))


def batches(example: Example) -> list[Batch]:
    """The batches among the inputs, encoders' left out."""
    return jax.tree.leaves(example.inputs, is_leaf=lambda part: isinstance(part, Batch))


def check_example(example: Example, vocab_size: int) -> None:
    """Raises UserError for a token, or a target with weight, outside of 0 to vocab_size - 1.

    Compiled programs read the last row of a table for such an id, or NaN, without an error, so the
    host asks before an example goes to the devices.

    Args:
      example: numpy arrays.
      vocab_size: number of tokens of the model, without padding.
    """
    for batch in batches(example):
        check_tokens(batch, vocab_size)
    is_targets = lambda part: isinstance(part, TokenTargets)  # noqa: E731
    for targets in filter(is_targets, jax.tree.leaves(example.targets, is_leaf=is_targets)):
        index = first_outside(np.asarray(targets.tokens), vocab_size, targets.weights != 0)
        if index is not None:
            raise UserError(
                f"targets{list(index)} of the batch is {targets.tokens[index]}; the model has the "
                f"tokens 0 to {vocab_size - 1}"
            )
