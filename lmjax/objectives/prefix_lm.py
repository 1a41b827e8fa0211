"""Prefix language modelling: a beginning that sees itself whole, then token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int, UInt64

from lmjax.config import config
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.causal_lm import CausalLM
from lmjax.objectives.compatibility import require_causal
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.prediction import Regularisers


@config
class PrefixLM(TextObjective):
    """Prediction of each document's rest from a prefix (Raffel et al. 2020, arXiv:1910.10683).

    The prefix's length is uniform, from one token to all but the last; its tokens see each other
    both ways, and only what follows them is predicted.
    """

    z_loss: float = 0.0  # weight of log(Z)^2, which keeps the softmax normalised

    def row_length(self, length: int) -> int:
        """One more than the inputs: the last is only a target."""
        return length + 1

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an encoder."""
        require_causal(self, model)

    @property
    def reads_prefix(self) -> bool:
        """See `Objective.reads_prefix`."""
        return True

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable | None = None,
        length: int | None = None,
    ) -> Example:
        """As for `CausalLM`, with ranks, and without the weights of targets inside the prefix."""
        example = CausalLM().prepare(tokens, segments, seeds)
        batch, targets = example.inputs, example.targets
        index = np.arange(batch.tokens.shape[1], dtype=np.int32)
        prefixes = np.zeros(batch.tokens.shape, np.int64)
        for row, seed in enumerate(seeds):
            first = np.flatnonzero(batch.positions[row] == 0)
            sizes = np.diff([*first, len(index)])
            drawn = RandomStream(seed).integers(1, sizes, len(sizes))
            prefixes[row] = np.repeat(drawn, sizes)
        inside = (batch.positions < prefixes) & (batch.segments > 0)
        predicted = batch.positions >= prefixes - 1
        ranks = np.where(inside, index - batch.positions, index).astype(np.int32)
        weights = targets.weights * predicted.astype(np.float32)
        return Example(
            dataclasses.replace(batch, ranks=ranks), TokenTargets(targets.tokens, weights)
        )

    def regularisers(self) -> Regularisers:
        """See `TextObjective.regularisers`."""
        return Regularisers(self.z_loss)
