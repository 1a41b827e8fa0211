"""Preferences as an objective: what the learner minimises on pairs of answers."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.alignment.comparison_rows import (
    RANK,
    REFERENCE_LOG_PROB,
    ComparisonObjective,
    answer_targets,
    label_column,
    slot_batches,
)
from lmjax.alignment.log_probabilities import log_probabilities, sum_segments
from lmjax.alignment.pair_packing import packed_pairs
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
    """Targets of pairs of answers; a pair has the same row, and segment of it, in both.

    Attributes:
      chosen, rejected: the next token at each position of the better and of the worse answers, with
        weight 1 for the tokens of the answer and 0 for the others.
      reference: log-probabilities of both under the reference policy, chosen first, by pair of a
        row, read where it is not among the frozen models. None: the loss reads none.
      pairs: most pairs of a row, which are its segments from 1 on.
    """

    chosen: TokenTargets
    rejected: TokenTargets
    reference: Float[AnyArray, "*batch pairs 2"] | None = None
    pairs: int = dataclasses.field(default=1, metadata={"static": True})


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
            reference = label_column(labels, len(tokens), 2, REFERENCE_LOG_PROB)[:, None]
        targets = PairTargets(chosen, rejected, reference)
        return Example(slot_batches(tokens, segments, 2), targets)

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an encoder."""
        require_causal(self, model)

    def weight(self, example: Example) -> Float[Array, ""]:
        """Number of pairs with two answers."""
        targets = example.targets
        chosen, rejected = (
            answer_lengths(batch, side, targets.pairs) > 0
            for batch, side in zip(example.inputs, (targets.chosen, targets.rejected), strict=True)
        )
        return jnp.sum((chosen & rejected).astype(jnp.float32))

    def packed(self, example: Example, fit_rows: Callable[[int], int]) -> Example:
        """See `TextObjective.packed`."""
        return packed_pairs(example, fit_rows)

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
                reference = score(frozen[REFERENCE], batch, side, targets.pairs).log_probs
            elif self.reads_reference and targets.reference is not None:
                reference = flat(targets.reference[..., number])
            found = score(model, batch, side, targets.pairs)
            answers.append(dataclasses.replace(found, reference=reference))
        return self.preference.sums(*answers)


def score(model: Transformer, batch: Batch, targets: TokenTargets, count: int = 1) -> Answers:
    """Log-probability of each answer under a model without dropout, and its length.

    Args:
      model: scores the answers.
      batch: rows with one answer in each of their segments.
      targets: the next tokens, with weight for those of answers.
      count: most answers of a row; all rows are taken to have so many.
    """
    hidden, _ = model(batch)
    log_probs = log_probabilities(model, hidden, targets.tokens)
    found = sum_segments(log_probs, targets.weights > 0, batch.segments, count)
    return Answers(flat(found), flat(answer_lengths(batch, targets, count)))


def answer_lengths(batch: Batch, targets: TokenTargets, count: int) -> Float[Array, "rows count"]:
    """Number of tokens of the answer in each segment."""
    real = jnp.asarray(targets.weights) > 0
    return sum_segments(real.astype(jnp.float32), real, jnp.asarray(batch.segments), count)


def flat(numbers: Float[Array, "rows count"]) -> Float[Array, "answers"]:
    """The answers of all rows, one after another."""
    rows, _ = jax.typeof(numbers).sharding.spec
    return jax.lax.reshape(numbers, (numbers.size,), out_sharding=PartitionSpec(rows))
