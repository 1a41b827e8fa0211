"""The device part that most objectives share: cross-entropy of targets with weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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


def predict(
    model: Transformer,
    hidden: Float[Array, "batch seq width"],
    targets: TokenTargets,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
) -> Sums:
    """Cross-entropy in nats, plus z_loss log(Z)^2 and max_z_loss (largest logit)^2, by weights.

    Args:
      model: gives its head.
      hidden: output of the model's last layer.
      targets: tokens to predict, and their weights.
      z_loss, max_z_loss: weights of the regularisers.
    """
    with jax.named_scope("head"):
        nll, log_z, *largest = cross_entropy(
            *head_factors(model, hidden),
            targets.tokens,
            vocabulary=model.config.vocab_size,
            softcap=model.config.logit_softcap,
            largest=bool(max_z_loss),
        )
    weights = targets.weights
    cross_entropy_sum = jnp.sum(nll * weights)
    loss = cross_entropy_sum
    if z_loss:
        loss = loss + z_loss * jnp.sum(jnp.square(log_z) * weights)
    for logit in largest:
        loss = loss + max_z_loss * jnp.sum(jnp.square(logit) * weights)
    return Sums(loss, jnp.sum(weights), {"cross_entropy": cross_entropy_sum})


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
