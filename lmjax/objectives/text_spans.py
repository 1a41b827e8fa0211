"""Examples of questions about a text for the objective on spans: one question a row."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.config import config
from lmjax.data.spans import RowSpans
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.compatibility import require_one_stack
from lmjax.objectives.example import Example
from lmjax.objectives.labels import SpanExtraction, SpanTargets
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.prediction import Sums
from lmjax.objectives.single_text import SingleTextObjective, batch_of_texts

ANSWERED = 1  # column of the labels of a question: whether it has an answer


@config
class TextSpans(SingleTextObjective):
    """The span of each context that answers a question, of `lmjax.data.Questions`.

    A row is a question and its context, which has token type 1. A context that is too long keeps
    its beginning; where that cuts the answer, the question is not learnt.
    """

    objective: SpanExtraction = SpanExtraction()  # the loss, with the name of its head

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model without the head, or that has an encoder and a decoder."""
        require_one_stack(self, model)
        self.objective.check(model)

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
        """See `TextObjective.prepare`; the targets are `SpanTargets` with one text a row."""
        shape = rows, width = tokens.shape
        context, found = np.zeros(shape, bool), np.zeros(rows, bool)
        starts, ends = np.zeros((2, rows, 1), np.int32)
        if spans is not None:
            answers = spans.of_kind("answer")
            context = spans.of_kind("second").mask(shape) | answers.mask(shape)
            # The last token of a row that is cut closes it.
            answers = answers.select(answers.end < width)
            starts[answers.row, 0], ends[answers.row, 0] = answers.first, answers.end - 1
            found[answers.row] = True
        wanted = np.full(rows, np.nan) if labels is None else labels[:, 0, ANSWERED]
        learnt = ~np.isnan(wanted) & (found | (wanted == 0))
        targets = SpanTargets(starts, ends, learnt[:, None].astype(np.float32))
        return Example(batch_of_texts(tokens, segments, context), targets)

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums of `objective` over the questions; see `Objective.loss_of_hidden`."""
        return self.objective.loss_of_hidden(model, hidden, example, key)
