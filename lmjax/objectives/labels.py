"""Objectives of heads that are trained on labels: classes, numbers, spans of a text."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.batch import Array as AnyArray
from lmjax.models.label_heads import HeadConfig, SpanHeadConfig, TextHeadConfig, TokenHeadConfig
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.example import Example
from lmjax.objectives.objective import Objective
from lmjax.objectives.prediction import Sums, check_smoothing, class_losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelTargets:
    """Labels of the texts of each row, or of its tokens.

    Attributes:
      labels: for `Classification` the number of the class; otherwise a number for each output of
        the head, on a further axis. Without meaning where the weight is 0.
      weights: weight of each label in the loss; 0 where there is no label.
    """

    labels: AnyArray
    weights: Float[AnyArray, "*batch rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpanTargets:
    """Spans of the texts of each row.

    Attributes:
      starts: index in the row of the first token of the span; for no span, of the text's.
      ends: index in the row of the last token of the span; for no span, of the text's first one.
      weights: weight of each text in the loss; 0 where it has no answer that counts.
    """

    starts: Int[AnyArray, "*batch texts"]
    ends: Int[AnyArray, "*batch texts"]
    weights: Float[AnyArray, "*batch texts"]


@config
class LabelObjective(Objective, abc.ABC):
    """Base of the objectives that train one of the model's heads on labels."""

    head: str = "label"  # name of the head

    kinds: ClassVar[tuple[type[HeadConfig], ...]] = (TextHeadConfig, TokenHeadConfig)

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model without the head."""
        self.head_of(model)

    @abc.abstractmethod
    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums over the labels; see `Objective.loss_of_hidden`."""

    def head_of(self, model: TransformerConfig) -> HeadConfig:
        """The head's config. UserError for a model that has no head of this kind and name."""
        for head in model.heads:
            if head.name == self.head and isinstance(head, self.kinds):
                return head
        kinds = " or ".join(kind.__name__.removesuffix("Config") for kind in self.kinds)
        raise UserError(
            f"objective={type(self).__name__} trains a head of the name {self.head!r} that is a"
            f" {kinds}; model.heads has none"
        )


@config
class Classification(LabelObjective):
    """One class of each text, or of each token, as the head has it: cross-entropy in nats.

    With label smoothing the target is 1 - label_smoothing for the class, and label_smoothing
    divided equally among all (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """

    label_smoothing: float = 0.0  # share of the target that all classes get

    def validate(self) -> None:
        """Raise UserError for a share that is none."""
        check_smoothing(self.label_smoothing)

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums over the labels; a label with weight that is no class makes the loss NaN."""
        logits, targets = outputs_for(self, model, hidden, example, key)
        weights, classes = targets.weights, logits.shape[-1]
        nll = class_losses(logits, targets.labels)
        known = (targets.labels >= 0) & (targets.labels < classes)
        nll = jnp.where(weights == 0, 0, jnp.where(known, nll, jnp.nan))
        right = jnp.argmax(logits, axis=-1) == targets.labels
        extra = {"accuracy": jnp.sum(weights * right), "cross_entropy": jnp.sum(weights * nll)}
        share = self.label_smoothing
        if share:
            even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            nll = (1 - share) * nll + share * even
        return Sums(jnp.sum(weights * nll), jnp.sum(weights), extra)


@config
class MultiLabelClassification(LabelObjective):
    """Any number of the classes of each text or token: mean of the classes' binary cross-entropies.

    Labels are 1 for a class that applies and 0 for one that does not.
    """

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums over the texts or tokens; right are those with every class right."""
        logits, targets = outputs_for(self, model, hidden, example, key)
        labels, weights = targets.labels.astype(jnp.float32), targets.weights
        losses = jnp.mean(jax.nn.softplus(logits) - labels * logits, axis=-1)
        right = jnp.all((logits > 0) == (labels > 0.5), axis=-1)
        extra = {"accuracy": jnp.sum(weights * right)}
        return Sums(jnp.sum(weights * losses), jnp.sum(weights), extra)


@config
class Regression(LabelObjective):
    """Numbers of each text or token: mean of the outputs' squared errors."""

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums over the texts or tokens."""
        outputs, targets = outputs_for(self, model, hidden, example, key)
        errors, weights = outputs - targets.labels, targets.weights
        extra = {"absolute_error": jnp.sum(weights * jnp.mean(jnp.abs(errors), axis=-1))}
        losses = jnp.mean(jnp.square(errors), axis=-1)
        return Sums(jnp.sum(weights * losses), jnp.sum(weights), extra)


@config
class SpanExtraction(LabelObjective):
    """Start and end of a span of each text (Devlin et al. 2019, arXiv:1810.04805, section 4.2).

    The loss of a text is the mean of two cross-entropies over its tokens, in nats. The text's first
    token ([CLS]) is start and end where there is no span (section 4.3).
    """

    kinds: ClassVar[tuple[type[HeadConfig], ...]] = (SpanHeadConfig,)

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums over the texts; a span with weight that is outside of its text is infinitely wrong.

        Right are the texts with both ends right.
        """
        layout = model.layout
        targets = jax.tree.map(lambda a: layout.reshard(a, "batch", None), example.targets)
        weights, texts = targets.weights, targets.weights.shape[1]
        logits = model.outputs(self.head, hidden, example.inputs, key=key)
        logits = layout.reshard(logits, "batch", None, None)
        own = text_tokens(layout.reshard(example.inputs.segments, "batch", None), texts)
        losses, right = 0.0, True
        for end, index in enumerate((targets.starts, targets.ends)):
            scores = jnp.where(own, logits[:, None, :, end], -jnp.inf)
            # Texts that do not count may have no token, and so no finite score.
            scores = jnp.where(weights[..., None] == 0, 0, scores)
            losses = losses + class_losses(scores, index) / 2
            right = right & (jnp.argmax(scores, axis=-1) == index)
        extra = {"accuracy": jnp.sum(weights * right)}
        losses = jnp.where(weights == 0, 0, losses)
        return Sums(jnp.sum(weights * losses), jnp.sum(weights), extra)


def outputs_for(
    objective: LabelObjective,
    model: Transformer,
    hidden: Float[Array, "batch seq width"],
    example: Example,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "batch rows outputs"], LabelTargets]:
    """Outputs of the objective's head for the targets of an example, and these cut like them."""
    inputs, layout, targets = example.inputs, model.layout, example.targets
    rows = None if objective.head_of(model.config).of_texts else "seq"
    outputs = model.outputs(objective.head, hidden, inputs, targets.weights.shape[1], key)
    names = ("batch", rows, None)
    return outputs, jax.tree.map(lambda a: layout.reshard(a, *names[: a.ndim]), targets)


def text_tokens(segments: Int[Array, "batch seq"], texts: int) -> Bool[Array, "batch texts seq"]:
    """Mask of the tokens of each of the first texts of a row."""
    return segments[:, None] == 1 + jnp.arange(texts, dtype=segments.dtype)[None, :, None]
