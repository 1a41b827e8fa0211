"""Training on conversations: predict what the assistant writes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt64

from lmjax.config import config
from lmjax.data.spans import RowSpans
from lmjax.objectives.causal_lm import CausalLM
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.lexicon import TokenTable


@config
class ChatLM(CausalLM):
    """Next-token prediction on the replies of conversations, each with the token that ends it.

    Documents that are no conversations are learned whole. Rows of whole documents
    (data.rows=whole_documents) keep every conversation in one piece. Conversations may have weights
    (`LossWeights`), by which each of their tokens counts in the loss and in what it is divided by.
    """

    # which replies: each of the assistant, the last of a conversation, or all messages of everyone
    loss_on: Literal["assistant", "last", "all"] = "assistant"

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`."""
        return True

    @property
    def predicts_text(self) -> bool:
        """See `TextObjective.predicts_text`."""
        return False

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable | None = None,
        length: int | None = None,
        spans: RowSpans | None = None,
    ) -> Example:
        """See `TextObjective.prepare`; targets outside of the replies weigh nothing."""
        example = super().prepare(tokens, segments, seeds, lexicon, length)
        if spans is None:
            return example
        replies = spans.of_kind("assistant")
        inside = replies.mask(tokens.shape) | spans.of_kind("user").mask(tokens.shape)
        learned = inside
        if self.loss_on != "all":
            learned = last_of_segments(replies, segments) if self.loss_on == "last" else replies
            learned = learned.mask(tokens.shape)
        # A conversation's first token, and what follows its last one, are nobody's to write.
        within = inside[:, :-1] & (segments[:, 1:] == segments[:, :-1])
        text = ~inside[:, 1:] & ~inside[:, :-1]
        weights = example.targets.weights * (learned[:, 1:] & within | text)
        weights = weights * spans.weights(tokens.shape)[:, 1:]
        return dataclasses.replace(
            example, targets=TokenTargets(example.targets.tokens, weights.astype(np.float32))
        )


def last_of_segments(spans: RowSpans, segments: Int[np.ndarray, "rows row_length"]) -> RowSpans:
    """The last span of each segment of the rows, of those that have tokens in them."""
    row_length = segments.shape[1]
    spans = spans.select((spans.first < row_length) & (spans.end > 0))
    segment = segments[spans.row, np.minimum(spans.end, row_length) - 1]
    following = np.stack([spans.row[1:], segment[1:]])
    is_last = np.ones(len(spans.row), bool)
    is_last[:-1] = (following != np.stack([spans.row[:-1], segment[:-1]])).any(axis=0)
    return spans.select(is_last)
