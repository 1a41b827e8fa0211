"""Examples of labelled texts for the objectives on labels: one text a row, with its label."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.config import UserError, config
from lmjax.data.spans import RowSpans
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.augmentation import Augmentation
from lmjax.objectives.compatibility import (
    require_causal,
    require_linear_head,
    require_one_stack,
)
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.labels import Classification, LabelObjective, LabelTargets, Regression
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.prediction import Sums, predict
from lmjax.objectives.single_text import SingleTextObjective, batch_of_texts

AUGMENTED = 0xA06  # what is folded into the key of a step for its changes of the texts
FILLER = "filler"  # name of the frozen model that fills what augmentation hides
LABEL = 1  # column of the labels of a document; the first is its number in its group


@config
class TextLabels(SingleTextObjective):
    """Class or number of each text of `lmjax.data.LabelledTexts` (data.rows=groups).

    A row is one text, or a pair, whose second text has token type 1 (Devlin et al. 2019,
    arXiv:1810.04805, section 3). A text that is too long keeps its beginning.
    """

    objective: LabelObjective = Classification()  # the loss; its head is one of texts
    augmentation: Augmentation | None = None  # changes of the texts in training
    # weight of the texts' own mean loss of a token, which the head of words learns too (GPT-1: 0.5)
    words: float = 0.0

    def validate(self) -> None:
        """Raises UserError for an objective on other labels, or a weight below 0."""
        if self.words < 0:
            raise UserError(f"words={self.words}: a weight is 0 or more")
        if not isinstance(self.objective, Classification | Regression):
            raise UserError(
                f"objective.objective={type(self.objective).__name__}: a text has one class"
                " (Classification), or one number (Regression)"
            )

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model without the head, or that has an encoder and a decoder."""
        require_one_stack(self, model)
        self.objective.check(model)
        if self.words:
            require_causal(self, model)
            require_linear_head(self, model)
        head = self.objective.head_of(model)
        if not head.of_texts:
            raise UserError(f"objective=TextLabels: the head {head.name!r} is not one of texts")
        if isinstance(self.objective, Regression) and head.outputs != 1:
            raise UserError(
                f"the head {head.name!r} has {head.outputs} outputs; a text has one number"
            )

    @property
    def predicts_words(self) -> bool:
        """See `TextObjective.predicts_words`."""
        return self.words > 0

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable | None = None,
        length: int | None = None,
        spans: RowSpans | None = None,
        labels: Float[np.ndarray, "rows 1 labels"] | None = None,
    ) -> Example:
        """See `TextObjective.prepare`; the targets are `LabelTargets` with one text a row."""
        second = None if spans is None else spans.of_kind("second").mask(tokens.shape)
        if labels is None:
            labels = np.full((len(tokens), 1, LABEL + 1), np.nan, np.float32)
        label = labels[:, :, LABEL]
        there = ~np.isnan(label)
        value = np.where(there, label, 0)
        if isinstance(self.objective, Regression):
            value = value[..., None].astype(np.float32)
        else:
            value = value.astype(np.int32)
        targets = LabelTargets(value, there.astype(np.float32))
        return Example(batch_of_texts(tokens, segments, second), targets)

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """See `Objective.loss`; in training, where there is a key, of texts that are changed.

        The frozen model "filler" fills what is hidden of them.
        """
        if key is not None and self.augmentation is not None:
            own, filler = jax.random.fold_in(key, AUGMENTED), (frozen or {}).get(FILLER)
            inputs = self.augmentation.apply(model, example.inputs, own, filler)
            example = dataclasses.replace(example, inputs=inputs)
        return super().loss(model, example, key, frozen)

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums of `objective` over the texts, and of their words; see `Objective.loss_of_hidden`.

        The loss of a text's words is their mean, as in the authors' code of GPT-1 (Radford et al.
        2018, section 3.2, an auxiliary objective of weight 0.5), so that each text weighs alike.
        """
        sums = self.objective.loss_of_hidden(model, hidden, example, key)
        if not self.words:
            return sums
        targets = _following(model, example)
        words = predict(model, hidden, targets).loss
        # Held-out texts are scored by their labels.
        extra = {"cross_entropy": sums.loss, **sums.extra, "words_loss": words}
        return Sums(sums.loss + self.words * words, sums.weight, extra)


def _following(model: Transformer, example: Example) -> TokenTargets:
    """The next token at each position of a text that has a label; the weights of a text are 1."""
    layout, inputs = model.layout, example.inputs
    tokens, segments = (layout.reshard(a, "batch", None) for a in (inputs.tokens, inputs.segments))
    labelled = layout.reshard(example.targets.weights, "batch", None)
    there = (segments[:, 1:] > 0).astype(jnp.float32)
    weights = labelled * there / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    found = (jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))), jnp.pad(weights, ((0, 0), (0, 1))))
    return TokenTargets(*(layout.reshard(a, "batch", "seq") for a in found))
