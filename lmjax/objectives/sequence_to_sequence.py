"""Fine-tuning of an encoder and a decoder: from a request to its reply."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt64

from lmjax.config import UserError, config
from lmjax.data.spans import RowSpans
from lmjax.models.infill import SentinelFormat
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.chat_lm import last_of_segments
from lmjax.objectives.compatibility import require_encoder_decoder
from lmjax.objectives.example import Example
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.rows import Rows, Sample

Pair = tuple[Int[np.ndarray, "request"], Int[np.ndarray, "reply"]]


@config
class SequenceToSequence(TextObjective):
    """Text to text (Raffel et al. 2020, arXiv:1910.10683, section 2.4): an encoder reads a request.

    The decoder writes the last reply of each conversation, with the token that ends it; the encoder
    reads all that comes before, and the tokenizer's end. Texts without a reply are left out; of a
    conversation that the edge of a row cuts, the part counts in which its last reply begins.

    A row has several conversations, as long as both sides have room for `length` tokens
    (data.rows=whole_documents).
    """

    start: str = "<pad>"  # token that the decoder begins with

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`: replies are spans."""
        return True

    @property
    def replies_apart(self) -> bool:
        """See `TextObjective.replies_apart`."""
        return True

    def row_length(self, length: int) -> int:
        """See `TextObjective.row_length`: the encoder's tokens and the decoder's."""
        return 2 * length

    def row_room(self, length: int) -> int:
        """See `TextObjective.row_room`: that of either."""
        return length

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model without an encoder beside its decoder."""
        require_encoder_decoder(self, model)

    def infill_format(self) -> SentinelFormat:
        """See `Objective.infill_format`: a request has no blank, and its reply is written."""
        return SentinelFormat(start=self.start, replies=True)

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
        spans: RowSpans | None = None,
    ) -> Example:
        """See `TextObjective.prepare`; each conversation is a segment of its own on both sides.

        Raises:
          UserError: the rows are not planned so that both sides have room.
        """
        encoder, decoder = Rows(len(tokens), length), Rows(len(tokens), length)
        start = lexicon.token(self.start)
        replies = RowSpans.none() if spans is None else spans.of_kind("assistant")
        for row, (request, reply) in pairs(tokens, segments, replies):
            if request[-1] != lexicon.end:
                request = np.append(request, lexicon.end)
            if len(request) > encoder.room(row) or len(reply) > decoder.room(row):
                raise UserError(
                    "SequenceToSequence: requests and replies have no room in their rows; it reads "
                    "rows of whole conversations, data.rows=whole_documents"
                )
            encoder.add(row, Sample(request, request, np.zeros(len(request))))
            shifted = np.append(start, reply[:-1])
            decoder.add(row, Sample(shifted, reply, np.ones(len(reply))))
        return decoder.example(encoder=encoder.batch())


def pairs(
    tokens: Int[np.ndarray, "rows row_length"],
    segments: Int[np.ndarray, "rows row_length"],
    replies: RowSpans,
) -> Iterator[tuple[int, Pair]]:
    """Row, request and last reply of each conversation of the rows, both with a token or more."""
    last = last_of_segments(replies, segments)
    row_length = tokens.shape[1]
    for row, first, end in zip(last.row, last.first, np.minimum(last.end, row_length), strict=True):
        if first < 1 or first >= end:
            continue
        begin = int(np.searchsorted(segments[row, :end], segments[row, end - 1]))
        if begin < first:
            yield int(row), (tokens[row, begin:first], tokens[row, first:end])
