"""Examples of texts whose words have classes, for heads of tokens: one text a row."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.config import UserError, config
from lmjax.data.spans import SETS, RowSpans
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.compatibility import require_one_stack
from lmjax.objectives.example import Example
from lmjax.objectives.labels import Classification, LabelTargets
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.prediction import Sums
from lmjax.objectives.single_text import SingleTextObjective, batch_of_texts


@config
class TokenLabels(SingleTextObjective):
    """Classes of the words of `lmjax.data.LabelledTokens` (data.rows=groups).

    The class of a word stands at one of its tokens, and the others have none (Devlin et al. 2019,
    arXiv:1810.04805, section 5.3). Several sets of classes, each with a head of its own, share one
    forward pass; the loss is the sum over the sets of weight times cross-entropy, and its mean is
    over the words with a class. A word whose class of one set is missing adds nothing there.

    A text that is too long keeps its beginning. The last token of a row has no class: it closes a
    text that is cut.
    """

    # the loss of each set of classes, in the order of the source; their heads have different names
    objectives: tuple[Classification, ...] = (Classification(),)
    weights: tuple[float, ...] = ()  # of the loss of each; none: 1
    # token of a word that has its class; none: the first one, and of a causal model the last one,
    # at which it has read the word
    at: Literal["first", "last"] | None = None

    def validate(self) -> None:
        """Raises UserError for heads that cannot be told apart, or weights that are none."""
        names = [one.head for one in self.objectives]
        if not 0 < len(names) <= SETS or len(set(names)) < len(names):
            raise UserError(
                f"objective.objectives: the heads are {names}; give one to {SETS}, of different"
                " names"
            )
        if self.weights and (len(self.weights) != len(names) or min(self.weights) <= 0):
            raise UserError(
                f"objective.weights={self.weights}: give a number above 0 for each of"
                f" {len(names)} sets of classes"
            )

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model without the heads, or with an encoder and a decoder."""
        require_one_stack(self, model)
        for one in self.objectives:
            if (head := one.head_of(model)).of_texts:
                raise UserError(f"objective=TokenLabels: the head {head.name!r} is one of texts")

    @property
    def counts(self) -> str:
        """See `Objective.counts`."""
        return "words"

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
        """See `TextObjective.prepare`; the targets are `LabelTargets` of each set of classes."""
        shape, spans = tokens.shape, RowSpans.none() if spans is None else spans
        targets = []
        for number in range(len(self.objectives)):
            found = spans.classes(shape, number, self.at == "last")
            found[:, -1] = -1
            there = (found >= 0).astype(np.float32)
            targets.append(LabelTargets(np.maximum(found, 0).astype(np.int32), there))
        return Example(batch_of_texts(tokens, segments), tuple(targets))

    def weight(self, example: Example) -> Float[Array, ""]:
        """Number of words with a class."""
        there = sum(jnp.asarray(one.weights) for one in example.targets)
        return jnp.sum((there > 0).astype(jnp.float32))

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums over the words; see `Objective.loss_of_hidden`.

        Of several sets, each of which may leave out other words, there is no accuracy.
        """
        weights = self.weights or (1.0,) * len(self.objectives)
        found = [
            one.loss_of_hidden(model, hidden, Example(example.inputs, targets), key)
            for one, targets in zip(self.objectives, example.targets, strict=True)
        ]
        loss = sum(weight * sums.loss for weight, sums in zip(weights, found))
        nats = sum(weight * sums.extra["cross_entropy"] for weight, sums in zip(weights, found))
        extra = found[0].extra if len(found) == 1 else {}
        return Sums(loss, self.weight(example), {**extra, "cross_entropy": nats})
