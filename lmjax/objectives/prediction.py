"""The device part that most objectives share: cross-entropy of targets with weights."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.config import UserError
from lmjax.models.batch import Array as AnyArray
from lmjax.models.transformer import Transformer
from lmjax.objectives.example import TokenTargets
from pallas_kernels.cross_entropy import cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Token-weighted sums over a batch; adding those of its parts gives those of the whole.

    Attributes:
      loss: sum of weight times loss, what is differentiated.
      weight: sum of weights, the one normaliser.
      extra: further sums for the metrics. "cross_entropy", the loss without its regularisers, is
        what held-out text is scored by; without it the loss is.
    """

    loss: Float[AnyArray, ""]
    weight: Float[AnyArray, ""]
    extra: dict[str, Float[AnyArray, ""]]


def check_smoothing(share: float) -> None:
    """Raises UserError for a label smoothing that is no share."""
    if not 0 <= share < 1:
        raise UserError(f"label_smoothing={share}: must be 0 or more, and below 1")


class Regularisers(NamedTuple):
    """Regularisers of the loss of tokens.

    Attributes:
      z_loss: weight of log(Z)^2.
      max_z_loss: weight of the largest logit's square.
      label_smoothing: share of the target that all tokens of the vocabulary get.
    """

    z_loss: float = 0.0
    max_z_loss: float = 0.0
    label_smoothing: float = 0.0


NONE = Regularisers()


def predict(
    model: Transformer,
    hidden: Float[Array, "batch seq width"],
    targets: TokenTargets,
    regularisers: Regularisers = NONE,
) -> Sums:
    """Cross-entropy in nats, plus z_loss log(Z)^2 and max_z_loss (largest logit)^2, by weights.

    With label smoothing the target is 1 - label_smoothing for the token, and label_smoothing
    divided equally among the vocabulary (Szegedy et al. 2016, arXiv:1512.00567, section 7).

    Args:
      model: gives its head.
      hidden: output of the model's last layer.
      targets: tokens to predict, and their weights.
      regularisers: their weights.
    """
    z_loss, max_z_loss, smoothing = regularisers
    with jax.named_scope("head"):
        factors = head_factors(model, hidden)
        nll, log_z, *largest = cross_entropy(
            *factors,
            targets.tokens,
            vocabulary=model.config.vocab_size,
            softcap=model.config.logit_softcap,
            largest=bool(max_z_loss),
        )
    weights = targets.weights
    cross_entropy_sum = jnp.sum(nll * weights)
    loss = cross_entropy_sum
    if smoothing:
        even = log_z - mean_logit(*factors, model.config.vocab_size)
        loss = (1 - smoothing) * loss + smoothing * jnp.sum(even * weights)
    if z_loss:
        loss = loss + z_loss * jnp.sum(jnp.square(log_z) * weights)
    for logit in largest:
        loss = loss + max_z_loss * jnp.sum(jnp.square(logit) * weights)
    return Sums(loss, jnp.sum(weights), {"cross_entropy": cross_entropy_sum})


def mean_logit(
    hidden: Float[Array, "batch seq inner"], table: Float[Array, "rows inner"], vocabulary: int
) -> Float[Array, "batch seq"]:
    """Mean over the vocabulary of the logits hidden . table, which is linear in them: no logits."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (table.shape[0], 1), 0)
    known = jnp.where(rows < vocabulary, table.astype(jnp.float32), 0)
    mean = jnp.sum(known, axis=0) / vocabulary
    return jnp.sum(hidden.astype(jnp.float32) * mean, axis=2)


def head_factors(
    model: Transformer, hidden: Float[Array, "batch seq width"]
) -> tuple[Float[Array, "batch seq inner"], Float[Array, "vocab inner"]]:
    """Two arrays whose product is the model's logits.

    A bias of the head's rows becomes two columns that are multiplied with ones: its value in the
    compute dtype, and what rounding to it took away.
    """
    hidden, table = model.head_input(hidden), model.head_table()
    if model.head_bias is None:
        return hidden, table
    bias = model.head_bias[...]
    rounded = bias.astype(table.dtype)
    rest = (bias - rounded.astype(bias.dtype)).astype(table.dtype)
    table = jnp.concatenate([table, rounded[:, None], rest[:, None]], axis=1)
    return jnp.concatenate([hidden, jnp.ones_like(hidden[..., :2])], axis=2), table


def class_losses(
    logits: Float[Array, "*rows classes"], labels: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Negative log-likelihood of each label in nats; a logit of -inf is of no class."""
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    chosen = jnp.where(classes == labels[..., None], logits, 0)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(chosen, axis=-1)
