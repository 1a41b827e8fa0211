"""The objective of a reward model: the better answer should have the higher score."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.alignment.comparison_rows import (
    MARGIN,
    RANK,
    ComparisonObjective,
    label_column,
    slot_batches,
)
from lmjax.alignment.ranking import ranking_loss
from lmjax.config import UserError, config
from lmjax.models import TextHeadConfig, Transformer, TransformerConfig
from lmjax.models.batch import Array as AnyArray
from lmjax.models.batch import Batch
from lmjax.objectives import Example, Sums, TokenTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankTargets:
    """Ranks of the answers of each comparison.

    Attributes:
      ranks: of the answers, the best the lowest.
      real: 1 for an answer that there is, 0 for an empty slot.
      margins: by which a better answer should win, the same for all of a comparison.
    """

    ranks: Int[AnyArray, "*batch answers"]
    real: Float[AnyArray, "*batch answers"]
    margins: Float[AnyArray, "*batch answers"]


@config
class RewardRanking(ComparisonObjective):
    """-log sigmoid of the lead of the better answer, over all pairs of the answers to a request.

    Ouyang et al. 2022 (arXiv:2203.02155, eq. 1): the mean over a request's pairs; ties are no
    pairs. All answers are rows of one forward pass.
    """

    head: str = "reward"  # name of the model's head with one output
    margins: bool = True  # take off the margins that the data give (LLaMA 2)
    centring: float = 0.0  # weight of (s_better + s_worse)^2, which keeps scores around 0

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model without a head of one output for a text."""
        for head in model.heads:
            if head.name == self.head and isinstance(head, TextHeadConfig) and head.outputs == 1:
                return
        raise UserError(
            f"objective=RewardRanking reads a TextHead with one output of the name {self.head!r};"
            " model.heads has none"
        )

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`."""
        return False

    @property
    def predicts_words(self) -> bool:
        """See `TextObjective.predicts_words`."""
        return False

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable | None = None,
        length: int | None = None,
        labels: Float[np.ndarray, "rows slots labels"] | None = None,
    ) -> Example:
        """See `TextObjective.prepare`; a batch for each answer."""
        rows, slots = len(tokens), self.answers
        ranks = label_column(labels, rows, slots, RANK)
        margins = label_column(labels, rows, slots, MARGIN)
        real = ~np.isnan(ranks)
        targets = RankTargets(
            # The number of better answers: data may rank by any numbers.
            (ranks[:, None, :] < ranks[:, :, None]).sum(axis=2).astype(np.int32),
            real.astype(np.float32),
            np.where(real, margins, 0).astype(np.float32),
        )
        return Example(slot_batches(tokens, segments, slots), targets)

    def weight(self, example: Example) -> Float[Array, ""]:
        """Number of comparisons with a pair of different ranks."""
        targets = example.targets
        scores = jnp.zeros_like(jnp.asarray(targets.real))
        return ranking_loss(scores, targets.ranks, targets.real > 0).weight

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums over comparisons, with the accuracy of their pairs."""
        targets, layout = example.targets, model.layout
        targets = jax.tree.map(lambda a: layout.reshard(a, "batch", None), targets)
        scores = self.scores(model, example.inputs, key)
        margins = None
        if self.margins:
            shape = (*scores.shape, scores.shape[1])
            margins = jnp.broadcast_to(targets.margins[:, :, None], shape)
        return ranking_loss(scores, targets.ranks, targets.real > 0, margins, self.centring)

    def scores(
        self, model: Transformer, inputs: tuple[Batch, ...], key: PRNGKeyArray | None = None
    ) -> Float[Array, "rows answers"]:
        """Score of each answer, from its last token."""
        layout = model.layout

        def rows_of(*parts: Array) -> Array:
            stacked = jnp.stack([layout.reshard(a, "batch", None) for a in parts], axis=1)
            shape = (stacked.shape[0] * stacked.shape[1], stacked.shape[2])
            return layout.reshard(jnp.reshape(stacked, shape), "batch", "seq")

        batch = jax.tree.map(rows_of, *inputs)
        hidden, _ = model(batch, key=key)
        scores = model.outputs(self.head, hidden, batch, 1, key)[:, 0, 0]
        return jnp.reshape(scores, (-1, self.answers))
