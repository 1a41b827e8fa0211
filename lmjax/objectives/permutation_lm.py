"""Permutation language modelling: hidden tokens one after another, in an order drawn at random."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, UInt64

from lmjax.config import UserError, config
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.example import Example
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.rows import Rows, Sample, pieces, require_targets


@config
class PermutationLM(TextObjective):
    """XLNet's objective (Yang et al. 2019, arXiv:1906.08237, sections 2.2 to 2.4 and A.6).

    Spans are predicted, one in each stretch of `context` times its length. All other tokens have
    rank 0 and see each other. Targets have the ranks 1, 2, ... in the order of prediction: each is
    predicted at its own place, by a stream of queries that sees lower ranks alone.
    """

    context: int = 6  # one token in so many is predicted
    longest: int = 5  # tokens of a predicted span; the probability of n is proportional to 1/n
    cross_documents: bool = False  # documents of a row see each other

    def validate(self) -> None:
        if self.context < 2 or self.longest < 1:
            raise UserError(
                f"context={self.context}, longest={self.longest}: one token in 2 or more is "
                "predicted, in spans of at least 1"
            )

    def row_length(self, length: int) -> int:
        """Tokens that the model reads: they are predicted at their own positions."""
        return length

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model with one stream, in which a target would see itself."""
        if not getattr(model, "two_streams", False):
            raise UserError(
                "PermutationLM needs a model with two streams, of which one does not see the token "
                "that it predicts, as XLNet has them; this model has one"
            )

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
    ) -> Example:
        """Chooses what is predicted, and its order."""
        rows = Rows(len(tokens), length, "ranks")
        for row, seed in enumerate(seeds):
            draws = RandomStream(seed)
            for piece in pieces(tokens[row], segments[row], self.cross_documents):
                chosen = self.choose(len(piece.tokens), draws) & ~lexicon.is_mark(piece.tokens)
                ranks = np.zeros(len(chosen), np.int64)
                ranks[chosen] = 1 + draws.order(int(chosen.sum()))
                weights = chosen.astype(np.float32)
                rows.add(row, Sample(piece.tokens, piece.tokens, weights, ranks=ranks))
        require_targets(rows.targets().weights, segments, "spans to predict")
        return rows.example()

    def choose(self, size: int, draws: RandomStream) -> Bool[np.ndarray, "size"]:
        """Mask of a document's targets."""
        odds = 1 / np.arange(1, self.longest + 1)
        lengths = 1 + draws.choices(np.cumsum(odds / odds.sum()), size // self.context + 1)
        stretches = self.context * lengths
        first = np.cumsum(stretches) - stretches
        first = first + draws.integers(0, stretches - lengths, len(lengths))
        lengths = np.clip(size - first, 0, lengths)
        edges = np.zeros(size + 1, np.int64)
        inside = lengths > 0
        np.add.at(edges, first[inside], 1)
        np.add.at(edges, (first + lengths)[inside], -1)
        return np.cumsum(edges[:-1]) > 0
