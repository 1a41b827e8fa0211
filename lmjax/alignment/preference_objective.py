"""Preferences as an objective: what the learner minimises on pairs of answers."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.alignment.comparison_rows import (
    RANK,
    REFERENCE_LOG_PROB,
    ComparisonObjective,
    answer_targets,
    label_column,
    slot_batches,
)
from lmjax.alignment.log_probabilities import log_probabilities, sum_rows
from lmjax.alignment.preferences import DPO, Answers, PreferenceLoss
from lmjax.config import UserError, config
from lmjax.data.spans import RowSpans
from lmjax.models.batch import Array as AnyArray
from lmjax.models.batch import Batch
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.compatibility import require_causal
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.prediction import Sums

REFERENCE = "reference"  # name of the frozen model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairTargets:
    """Targets of pairs of answers; a pair has the same row in both.

    Attributes:
      chosen, rejected: the next token at each position of the better and of the worse answers, with
        weight 1 for the tokens of the answer and 0 for the others (`answer_mask`).
      reference: log-probabilities of both under the reference policy, chosen first, read where it
        is not among the frozen models. None: the loss reads none.
    """

    chosen: TokenTargets
    rejected: TokenTargets
    reference: Float[AnyArray, "*batch 2"] | None = None


@config
class PreferenceObjective(ComparisonObjective, abc.ABC):
    """Base of the objectives that train a policy on comparisons, without a reward model."""

    @property
    def reads_reference(self) -> bool:
        """Returns whether the loss compares with a reference policy."""
        return True

    @property
    def keeps_reference(self) -> bool:
        """Returns whether the reference must be at hand in training, as a frozen model."""
        return False


@config
class PreferencePairs(PreferenceObjective):
    """A policy trained on pairs of a better and a worse answer (data.rows=groups).

    `Example.inputs` are two batches: the rows with the chosen answers and those with the rejected
    ones. The reference policy is the frozen model "reference", or its log-probabilities are in the
    targets. Dropout is off, as it would make policy and reference differ before any update.
    """

    preference: PreferenceLoss = DPO()  # the loss of a pair

    @property
    def reads_reference(self) -> bool:
        """See `PreferenceObjective.reads_reference`."""
        return self.preference.reads_reference

    def validate(self) -> None:
        """Raises UserError for other than two answers."""
        if self.answers != 2:
            raise UserError(f"answers={self.answers}: a pair has 2")

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable | None = None,
        length: int | None = None,
        spans: RowSpans | None = None,
        labels: Float[np.ndarray, "rows slots labels"] | None = None,
    ) -> Example:
        """See `TextObjective.prepare`; pairs of one rank have no weight."""
        ranks = label_column(labels, len(tokens), 2, RANK)
        is_pair = (ranks[:, 0] < ranks[:, 1]).astype(np.float32)[:, None]
        sides = answer_targets(tokens, segments, spans, 2)
        chosen, rejected = (TokenTargets(s.tokens, s.weights * is_pair) for s in sides)
        reference = None
        if self.reads_reference:
            reference = label_column(labels, len(tokens), 2, REFERENCE_LOG_PROB)
        targets = PairTargets(chosen, rejected, reference)
        return Example(slot_batches(tokens, segments, 2), targets)

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an encoder."""
        require_causal(self, model)

    def weight(self, example: Example) -> Float[Array, ""]:
        """Number of pairs with two answers."""
        targets = example.targets
        chosen, rejected = (
            jnp.any(jnp.asarray(side.weights) > 0, axis=1)
            for side in (targets.chosen, targets.rejected)
        )
        return jnp.sum((chosen & rejected).astype(jnp.float32))

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums over the pairs; see `PreferenceLoss.sums`."""
        targets, answers = example.targets, []
        for number, (batch, side) in enumerate(
            zip(example.inputs, (targets.chosen, targets.rejected), strict=True)
        ):
            reference = None
            if self.reads_reference and frozen and REFERENCE in frozen:
                reference = score(frozen[REFERENCE], batch, side).log_probs
            elif self.reads_reference and targets.reference is not None:
                reference = targets.reference[:, number]
            answers.append(dataclasses.replace(score(model, batch, side), reference=reference))
        return self.preference.sums(*answers)


def score(model: Transformer, batch: Batch, targets: TokenTargets) -> Answers:
    """Log-probability of each row's answer under a model without dropout, and its length."""
    hidden, _ = model(batch)
    mask = targets.weights > 0
    log_probs = sum_rows(log_probabilities(model, hidden, targets.tokens), mask)
    return Answers(log_probs, jnp.sum(mask.astype(jnp.float32), axis=1))
