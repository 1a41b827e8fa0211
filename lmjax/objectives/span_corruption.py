"""T5's objective: an encoder reads a text with gaps, a decoder writes what is missing."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, UInt64

from lmjax.config import UserError, config
from lmjax.models.infill import SentinelFormat
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.compatibility import require_encoder_decoder, require_linear_head
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.example import Example
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.prediction import Regularisers, check_smoothing
from lmjax.objectives.rows import Rows, Sample, pieces, require_targets


@config
class SpanCorruption(TextObjective):
    """Span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4).

    Of n tokens round(share n) are left out, in round(that / mean) spans. A sentinel stands for each
    span in the encoder; the decoder writes each sentinel and its span, and the tokenizer's end.
    For rows of 512 the store gives 568 tokens, and the decoder has 114.
    """

    share: float = 0.15  # of the tokens that are left out
    mean: float = 3.0  # length of the spans
    cross_documents: bool = True  # a row is one text, as T5 had it, or each document of it is
    sentinel: str = "<extra_id_{}>"  # name of the tokens for spans, from number 0 on
    start: str = "<pad>"  # token that the decoder begins with
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps the softmax normalised
    label_smoothing: float = 0.0  # share of the target that the whole vocabulary gets

    def validate(self) -> None:
        check_smoothing(self.label_smoothing)
        if not 0 < self.share < 1 or self.mean < 1:
            raise UserError(
                f"share={self.share}, mean={self.mean}: a share lies between 0 and 1, and spans "
                "have at least 1 token"
            )
        if "{}" not in self.sentinel:
            raise UserError(f"sentinel={self.sentinel!r} needs {{}} where the number stands")

    def amounts(self, size: int) -> tuple[int, int]:
        """Tokens that are left out of `size`, and spans they lie in; some of each if it can be."""
        hidden = min(max(round(self.share * size), 1), size - 1)
        spans = max(round(hidden / self.mean), 1)
        return hidden, min(spans, size - hidden)

    def lengths(self, size: int) -> tuple[int, int]:
        """Tokens of the encoder and of the decoder for `size` tokens of text."""
        hidden, spans = self.amounts(size)
        return size - hidden + spans + 1, hidden + spans + 1

    def row_length(self, length: int) -> int:
        """The longest text for which the encoder needs no more than `length`."""
        size = 2
        while self.lengths(size + 1)[0] <= length:
            size += 1
        return size

    def fitting(self, size: int, read: int, written: int) -> int:
        """Most of `size` tokens of text that have room in the encoder and in the decoder."""
        while size > 1:
            lengths = self.lengths(size)
            if lengths[0] <= read and lengths[1] <= written:
                return size
            size -= 1
        return 0

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model without an encoder beside its decoder."""
        require_encoder_decoder(self, model)
        require_linear_head(self, model)

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
    ) -> Example:
        """Leaves spans out.

        Raises:
          UserError: the tokenizer lacks a sentinel.
        """
        size = tokens.shape[1]
        most = self.amounts(size)[1] if self.cross_documents else size // 2
        sentinels = np.array(self.sentinels(lexicon, most))
        encoder = Rows(len(tokens), length)
        decoder = Rows(len(tokens), self.lengths(size)[1])
        start = lexicon.token(self.start)
        for row, seed in enumerate(seeds):
            draws = RandomStream(seed)
            for piece in pieces(tokens[row], segments[row], self.cross_documents):
                text = piece.tokens
                if not self.cross_documents:  # its end is written by what follows
                    text = text[: len(text) - int(text[-1] == lexicon.end)]
                text = text[: self.fitting(len(text), encoder.room(row), decoder.room(row))]
                if len(text) < 2 or self.amounts(len(text))[1] > len(sentinels):
                    continue
                is_hidden = self.choose(len(text), draws)
                inputs = leave_out(text, is_hidden, sentinels, lexicon.end)
                targets = leave_out(text, ~is_hidden, sentinels, lexicon.end)
                encoder.add(row, Sample(inputs, inputs, np.zeros(len(inputs))))
                shifted = np.append(start, targets[:-1])
                decoder.add(row, Sample(shifted, targets, np.ones(len(targets))))
        require_targets(decoder.targets().weights, segments, "spans to leave out")
        return decoder.example(encoder=encoder.batch())

    def infill_format(self) -> SentinelFormat:
        """See `Objective.infill_format`."""
        return SentinelFormat(self.sentinel, self.start)

    def sentinels(self, lexicon: TokenTable, most: int) -> list[int]:
        """Ids of the sentinels: as many as a text needs, or for documents as many as there are."""
        if self.cross_documents:
            return [lexicon.token(self.sentinel.format(number)) for number in range(most)]
        found = [lexicon.token(self.sentinel.format(0))]
        while len(found) < most and self.sentinel.format(len(found)) in lexicon.special:
            found.append(lexicon.token(self.sentinel.format(len(found))))
        return found

    def choose(self, size: int, draws: RandomStream) -> Bool[np.ndarray, "size"]:
        """Mask of the tokens that are left out: text and spans in turn, beginning with text."""
        hidden, spans = self.amounts(size)
        parts = [random_parts(total, spans, draws) for total in (size - hidden, hidden)]
        lengths = np.stack(parts, axis=1).ravel()
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)

    def regularisers(self) -> Regularisers:
        """See `TextObjective.regularisers`."""
        return Regularisers(self.z_loss, label_smoothing=self.label_smoothing)


def random_parts(total: int, parts: int, draws: RandomStream) -> Int[np.ndarray, "parts"]:
    """A way to write `total` as a sum of that many numbers from 1 on; all ways are as likely."""
    cuts = 1 + np.sort(draws.order(total - 1)[: parts - 1])
    return np.diff([0, *cuts, total])


def leave_out(
    tokens: Int[np.ndarray, "text"],
    left_out: Bool[np.ndarray, "text"],
    sentinels: Int[np.ndarray, "spans"],
    end: int,
) -> Int[np.ndarray, "rest"]:
    """The text with a sentinel for each run that is left out, and `end` behind it."""
    begins = left_out & ~np.append(False, left_out[:-1])
    replaced = tokens.copy()
    replaced[begins] = sentinels[: begins.sum()]
    return np.append(replaced[begins | ~left_out], end)
