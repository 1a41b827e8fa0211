"""Rows of compared answers as batches, one for each slot."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from lmjax.alignment.comparison_accuracy import require_pairs
from lmjax.config import config
from lmjax.data.spans import RowSpans
from lmjax.data.store import TokenStore
from lmjax.models.batch import Batch
from lmjax.objectives import TextObjective, TokenTargets
from lmjax.objectives.chat_lm import last_of_segments

# Columns of the labels of compared answers; the last one is not of their source, but a reference's.
RANK, MARGIN, REFERENCE_LOG_PROB = 1, 2, 3
Tokens = Int[np.ndarray, "rows row_length"]


@config
class ComparisonObjective(TextObjective, abc.ABC):
    """Base of the objectives that read groups of answers to one request (data.rows=groups)."""

    answers: int = 2  # most answers of a comparison; data.length is the tokens of one

    @property
    def slots(self) -> int:
        """See `TextObjective.slots`."""
        return self.answers

    @property
    def counts(self) -> str:
        """See `Objective.counts`."""
        return "comparisons"

    def check_stores(self, stores: Mapping[str, TokenStore]) -> None:
        """Raises UserError for comparisons that teach nothing, here those without pairs.

        Args:
          stores: by what users know them as.
        """
        require_pairs(stores, self.answers)

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`."""
        return True

    def row_length(self, length: int) -> int:
        """See `TextObjective.row_length`: a slot for each answer."""
        return self.answers * length


def slot_batches(tokens: Tokens, segments: Tokens, slots: int) -> tuple[Batch, ...]:
    """Batch of each slot of rows with several; a slot without a document is padding."""
    rows, length = len(tokens), tokens.shape[1] // slots
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return tuple(
        Batch(
            tokens=np.ascontiguousarray(part, np.int32),
            positions=positions.copy(),
            segments=(segment > 0).astype(np.int32),
        )
        for part, segment in zip(
            np.split(tokens, slots, axis=1), np.split(segments, slots, axis=1), strict=True
        )
    )


def answer_targets(
    tokens: Tokens, segments: Tokens, spans: RowSpans | None, slots: int
) -> tuple[TokenTargets, ...]:
    """Next tokens in each slot, with weight 1 in the last reply and what ends it."""
    mask = np.zeros(tokens.shape, bool)
    if spans is not None:
        mask = last_of_segments(spans.of_kind("assistant"), segments).mask(tokens.shape)
    targets = []
    for part, answer in zip(
        np.split(tokens, slots, axis=1), np.split(mask, slots, axis=1), strict=True
    ):
        weights = np.zeros(part.shape, np.float32)
        weights[:, :-1] = answer[:, 1:]
        following = np.zeros(part.shape, np.int32)
        following[:, :-1] = part[:, 1:]
        targets.append(TokenTargets(following, weights))
    return tuple(targets)


def label_column(
    labels: Float[np.ndarray, "rows slots labels"] | None, rows: int, slots: int, column: int
) -> Float[np.ndarray, "rows slots"]:
    """One label of every document of the rows; NaN where there is none."""
    if labels is None or column >= labels.shape[2]:
        return np.full((rows, slots), np.nan, np.float32)
    return labels[:, :, column]
