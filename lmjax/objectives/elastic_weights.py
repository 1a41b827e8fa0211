"""Elastic weight consolidation: training that keeps the parameters which old tasks need.

Kirkpatrick et al. 2017 (arXiv:1612.00796).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.transformer import Transformer
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.extended import ExtendedObjective
from lmjax.objectives.labels import Classification, LabelTargets, outputs_for
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.prediction import Sums, predict
from lmjax.objectives.text_labels import TextLabels
from lmjax.objectives.token_labels import TokenLabels

ANCHOR, FISHER = "anchor", "fisher"  # names of the frozen models

# (parameters, example, key) -> summed negative log-likelihood of labels drawn by the key from the
# model's own predictions, and what to divide by.
SampledLoss = Callable[[Any, Any, PRNGKeyArray], Sums]


def diagonal_fisher(loss: SampledLoss, params: Any, examples: Any, key: PRNGKeyArray) -> Any:
    """Diagonal of the Fisher information at the parameters, in their structure.

    Mean of the squared gradients. The labels must be drawn from the model: those of the data would
    give the empirical Fisher, which is another matrix (Kunstner et al. 2019, arXiv:1905.12558).
    The arguments are those of `fisher_sums`.
    """
    squares, weight = fisher_sums(loss, params, examples, key)
    return jax.tree.map(lambda a: a / jnp.where(weight > 0, weight, 1), squares)


def fisher_sums(
    loss: SampledLoss, params: Any, examples: Any, key: PRNGKeyArray
) -> tuple[Any, Float[Array, ""]]:
    """Sum of the squared gradients, and of the weights that its mean is taken by.

    Args:
      loss: see `sampled_loss`.
      params: a pytree of arrays.
      examples: a pytree whose first axis is gone through one element after another: single rows,
        or whole batches, which take fewer steps but vary more (their gradients are squared as
        sums; labels that are independent make the cross terms 0 in expectation).
      key: for the labels.
    """

    def add(total, inputs):
        example, key = inputs

        def summed(params):
            sums = loss(params, example, key)
            return sums.loss, sums.weight

        gradients, weight = jax.grad(summed, has_aux=True)(params)
        squares = jax.tree.map(jnp.square, gradients)
        return jax.tree.map(jnp.add, total, (squares, weight)), None

    keys = jax.random.split(key, jax.tree.leaves(examples)[0].shape[0])
    start = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(add, start, (examples, keys))
    return total


def sampled_loss(model: Transformer, example: Example, key: PRNGKeyArray) -> Sums:
    """Cross-entropy in nats of one token drawn at each target from the model's predictions.

    Holds the logits of all of the example's tokens at once.
    """
    hidden, _ = model(example.inputs)
    logits = jax.lax.stop_gradient(model.logits(hidden))
    noise = jax.reshard(jax.random.gumbel(key, logits.shape), jax.typeof(logits).sharding.spec)
    drawn = jnp.argmax(logits + noise, axis=2)
    weights = (example.targets.weights > 0).astype(jnp.float32)
    return predict(model, hidden, TokenTargets(drawn.astype(jnp.int32), weights))


def sampled_class_loss(
    objective: TextLabels | TokenLabels, model: Transformer, example: Example, key: PRNGKeyArray
) -> Sums:
    """Cross-entropy in nats of a class drawn for each text, or word, from the model's predictions.

    Of several sets of classes, one of each is drawn. What a `TextLabels` learns of words beside the
    classes is left out, and so are label smoothing and the weights of sets.
    """
    hidden, _ = model(example.inputs)
    if isinstance(objective, TokenLabels):
        pairs = list(zip(objective.objectives, example.targets, strict=True))
    else:
        pairs = [(objective.objective, example.targets)]
    loss = 0.0
    for number, (one, targets) in enumerate(pairs):
        own = Example(example.inputs, targets)
        logits, targets = outputs_for(one, model, hidden, own, None)
        logits = jax.lax.stop_gradient(logits)
        noise = jax.random.gumbel(jax.random.fold_in(key, number), logits.shape)
        noise = jax.reshard(noise, jax.typeof(logits).sharding.spec)
        drawn = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
        weights = (targets.weights > 0).astype(jnp.float32)
        own = Example(example.inputs, LabelTargets(drawn, weights))
        loss = loss + one.loss_of_hidden(model, hidden, own, None).extra["cross_entropy"]
    return Sums(loss, objective.weight(example), {})


def predicts_classes(objective: TextObjective) -> bool:
    """Returns whether `sampled_class_loss` is that of an objective."""
    if isinstance(objective, TextLabels):
        return isinstance(objective.objective, Classification)
    return isinstance(objective, TokenLabels)


def quadratic_penalty(params: Any, anchor: Any, fisher: Any) -> Float[Array, ""]:
    """Half the sum of fisher (parameter - anchor)^2 over three pytrees of one structure."""
    terms = jax.tree.map(lambda p, a, f: jnp.sum(f * jnp.square(p - a)), params, anchor, fisher)
    return sum(jax.tree.leaves(terms)) / 2


@config
class ElasticWeights(ExtendedObjective):
    """Any objective plus strength times the quadratic penalty of leaving what was learnt before.

    Two frozen models of the trained one's structure: "anchor" has the parameters after the old
    task, "fisher" their `diagonal_fisher`. Both are constants.
    """

    strength: float = 1000.0  # lambda; found by a sweep, about 1e2 to 1e5

    def validate(self) -> None:
        """Raises UserError for a strength that is not above 0."""
        if self.strength <= 0:
            raise UserError(f"strength={self.strength}: must be above 0")

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """The objective's sums and, by their weight, the penalty; `extra` has both.

        Raises:
          UserError: a frozen model is missing.
        """
        for name in (ANCHOR, FISHER):
            if name not in (frozen or {}):
                raise UserError(
                    f"ElasticWeights reads the frozen model {name!r}, and there is none"
                )
        sums = self.objective.loss(model, example, key, frozen)
        anchor, fisher = (nnx.state(frozen[name], nnx.Param) for name in (ANCHOR, FISHER))
        params = jax.tree.map(  # ZeRO 1 and 2 have gathered them
            lambda p, a: jax.reshard(p, jax.typeof(a).sharding.spec),
            nnx.state(model, nnx.Param),
            anchor,
        )
        # By the weight, so that of any number of microbatches each adds its share.
        penalty = self.strength * quadratic_penalty(params, anchor, fisher) * sums.weight
        extra = {"cross_entropy": sums.loss, **sums.extra, "elastic_penalty": penalty}
        return Sums(sums.loss + penalty, sums.weight, extra)
