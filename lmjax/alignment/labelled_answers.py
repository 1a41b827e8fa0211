"""Answers with a label as an objective: KTO, which needs no pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.alignment.comparison_rows import RANK, answer_targets, label_column, slot_batches
from lmjax.alignment.preference_objective import REFERENCE, PreferenceObjective, score
from lmjax.alignment.preferences import KTO, Answers, divergence_of, log_ratio_sums
from lmjax.config import UserError, config
from lmjax.data.spans import RowSpans
from lmjax.data.store import TokenStore
from lmjax.models.batch import Array as AnyArray
from lmjax.models.batch import Batch
from lmjax.models.transformer import Transformer
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.prediction import Sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnswerLabels:
    """Targets of answers that are wanted or not.

    Attributes:
      answers: of each slot, the next token at each position, with weight 1 for the tokens of an
        answer that has a label.
      wanted: 1 for an answer that is wanted, of each slot.
      others: likewise for the answer of another row after each request; None: not made yet.
      kl: divergence of the whole batch; None: it is that of the rows at hand.
    """

    answers: tuple[TokenTargets, ...]
    wanted: Float[AnyArray, "*batch slots"]
    others: tuple[TokenTargets, ...] | None = None
    kl: Float[AnyArray, "*batch"] | None = None


@config
class LabelledAnswers(PreferenceObjective):
    """A policy trained on answers that are wanted or not (data.rows=groups), by KTO.

    An answer without others has its own label. Of several that were compared the best are wanted
    and the others are not; of ties nothing is learnt.

    The divergence in the loss is estimated as in the paper: from each request of the batch with the
    answer of the row before it, the last row's for the first one. It is that of the whole batch,
    whatever microbatches it is computed in. The reference policy is the frozen model "reference".
    Which answers meet which requests depends on the batch, so that it scores these in every step.
    It scores the rows' own answers there too, in one forward pass of the six that a step costs
    (backward counts as two): to keep these on disk would save nothing in the first epoch.
    """

    answers: int = 1  # most answers of a comparison: 1 where each has a label, 2 of pairs
    preference: KTO = KTO()  # the loss of an answer

    def validate(self) -> None:
        """Raises UserError for no answers."""
        if self.answers < 1:
            raise UserError(f"answers={self.answers}: must be at least 1")

    @property
    def counts(self) -> str:
        """See `Objective.counts`."""
        return "answers"

    @property
    def keeps_reference(self) -> bool:
        """See `PreferenceObjective.keeps_reference`: answers of other rows differ by batch."""
        return True

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
        """See `TextObjective.prepare`."""
        slots = self.answers
        wanted = wanted_of(label_column(labels, len(tokens), slots, RANK))
        has_label = (~np.isnan(wanted)).astype(np.float32)
        sides = answer_targets(tokens, segments, spans, slots)
        answers = tuple(
            TokenTargets(side.tokens, side.weights * has_label[:, n, None])
            for n, side in enumerate(sides)
        )
        wanted = np.nan_to_num(wanted).astype(np.float32)
        return Example(slot_batches(tokens, segments, slots), AnswerLabels(answers, wanted))

    def check_stores(self, stores: Mapping[str, TokenStore]) -> None:
        """See `ComparisonObjective.check_stores`."""
        for name, store in stores.items():
            if not store.labels.shape[1]:  # refused where its rows are made
                continue
            if (most := most_answers(store)) > self.answers:
                raise UserError(
                    f"{name}: its comparisons have up to {most} answers, and objective.answers="
                    f"{self.answers} reads only the best of each: set objective.answers={most}"
                )
            if not sum(count_labels(store)):
                raise UserError(f"{name}: none of its answers has a label; all of them are ties")

    def weight(self, example: Example) -> Float[Array, ""]:
        """Number of answers with a label."""
        parts = (jnp.any(jnp.asarray(side.weights) > 0, axis=1) for side in example.targets.answers)
        return sum(jnp.sum(part.astype(jnp.float32)) for part in parts)

    def normalise(self, example: Example) -> Example:
        """The example with the answers of other rows."""
        pairs = zip(example.inputs, example.targets.answers, strict=True)
        batches, others = zip(*(with_other_answers(*pair) for pair in pairs), strict=True)
        targets = dataclasses.replace(example.targets, others=others)
        return Example((*example.inputs, *batches), targets)

    def batch_sums(self, model: Transformer, example: Example, frozen: Any = None) -> Sums:
        """See `Objective.batch_sums`: log-ratios of the answers of other rows."""
        others = zip(example.inputs[self.answers :], example.targets.others, strict=True)
        found = [log_ratio_sums(self._answers(model, *part, frozen)) for part in others]
        return jax.tree.map(lambda *parts: sum(parts), *found)

    def with_batch_sums(self, example: Example, sums: Sums) -> Example:
        """See `Objective.with_batch_sums`."""
        kl = jnp.broadcast_to(divergence_of(sums), example.targets.wanted.shape[:1])
        return dataclasses.replace(example, targets=dataclasses.replace(example.targets, kl=kl))

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums over the answers; see `KTO.sums`."""
        targets, found = example.targets, []
        if targets.kl is None:
            kl = divergence_of(self.batch_sums(model, example, frozen))
        else:
            kl = targets.kl[0]  # of all rows
        wanted = model.layout.reshard(targets.wanted, "batch", None)
        for number, (batch, side) in enumerate(zip(example.inputs, targets.answers)):
            answers = self._answers(model, batch, side, frozen)
            found.append(self.preference.sums(answers, wanted[:, number] > 0, kl))
        return jax.tree.map(lambda *parts: sum(parts), *found)

    def _answers(
        self, model: Transformer, batch: Batch, targets: TokenTargets, frozen: Any
    ) -> Answers:
        """Answers under the policy and the reference."""
        reference = None
        if frozen and REFERENCE in frozen:
            reference = score(frozen[REFERENCE], batch, targets).log_probs
        return dataclasses.replace(score(model, batch, targets), reference=reference)


def wanted_of(
    ranks: Float[np.ndarray, "comparisons slots"],
) -> Float[np.ndarray, "comparisons slots"]:
    """Labels of the answers of each comparison: 1, 0, or NaN for ties and empty slots.

    Args:
      ranks: of the answers; NaN where there is none. Of an answer alone 0 means that it is wanted.
    """
    is_real = ~np.isnan(ranks)
    best = np.min(ranks, axis=1, keepdims=True, where=is_real, initial=np.inf)
    worst = np.max(ranks, axis=1, keepdims=True, where=is_real, initial=-np.inf)
    alone = is_real.sum(axis=1, keepdims=True) == 1
    wanted = np.where(alone, ranks <= 0, ranks == best)
    return np.where(is_real & (alone | (best < worst)), wanted, np.nan)


def most_answers(store: TokenStore) -> int:
    """Answers of the comparison that has most of them."""
    return int(np.max(store.labels[:, 0], initial=0)) + 1


def count_labels(store: TokenStore) -> tuple[int, int]:
    """Numbers of the store's answers that are wanted, and that are not."""
    number = store.labels[:, 0].astype(np.int64)
    group = np.cumsum(number == 0) - 1
    shape = np.max(group, initial=-1) + 1, np.max(number, initial=0) + 1
    ranks = np.full(shape, np.nan)
    ranks[group, number] = store.labels[:, RANK]
    wanted = wanted_of(ranks)
    return int(np.sum(wanted == 1)), int(np.sum(wanted == 0))


def with_other_answers(batch: Batch, targets: TokenTargets) -> tuple[Batch, TokenTargets]:
    """The rows with the answer of the row before in place of their own, and its targets.

    The first row has the answer of the last one. What is too long loses its beginning, as in
    `Groups`. A row without an answer, or after one without, has no targets.

    Args:
      batch: requests with answers, padded on the right, on the devices.
      targets: next tokens, with a weight for those of the answer.

    Raises:
      UserError: there is one row, whose own answer would be that of another.
    """
    if len(batch.tokens) == 1:
        raise UserError(
            "LabelledAnswers estimates the divergence from the answers of other rows, and a batch "
            "of one row has none: give at least 2 rows"
        )
    spec = jax.typeof(batch.tokens).sharding.spec
    tokens, weights = (jax.reshard(a, PartitionSpec()) for a in (batch.tokens, targets.weights))
    length = tokens.shape[1]
    size = jnp.sum(weights > 0, axis=1)[:, None]
    first = jnp.argmax(weights > 0, axis=1)[:, None] + 1  # token of the answer
    other, other_first, other_size = (jnp.roll(a, 1, axis=0) for a in (tokens, first, size))
    end = first + other_size
    # Position in the text before it is cut.
    at = jnp.arange(length) + jnp.maximum(end - length, 0)
    own = jnp.take_along_axis(tokens, jnp.clip(at, 0, length - 1), axis=1)
    index = jnp.clip(at - first + other_first, 0, length - 1)
    joined = jnp.where(at < first, own, jnp.take_along_axis(other, index, axis=1))
    joined = jnp.where(at < end, joined, 0)
    is_answer = (at + 1 >= first) & (at + 1 < end) & (size > 0) & (other_size > 0)
    following = jnp.roll(joined, -1, axis=1).at[:, -1].set(0)
    arrays = joined, (at < end).astype(batch.segments.dtype), following, is_answer
    joined, segments, following, is_answer = (jax.reshard(a, spec) for a in arrays)
    found = TokenTargets(following, is_answer.astype(targets.weights.dtype))
    return dataclasses.replace(batch, tokens=joined, segments=segments), found
