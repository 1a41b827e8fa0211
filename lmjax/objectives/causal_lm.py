"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, UInt64

from lmjax.config import config
from lmjax.models.batch import Batch
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.compatibility import require_causal, require_linear_head
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.prediction import Regularisers, check_smoothing


@config
class CausalLM(TextObjective):
    """Next-token prediction over packed documents."""

    # Let attention and positions run across documents of a row, as GPT-3 did.
    cross_documents: bool = False
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps the softmax normalised (PaLM: 1e-4)
    max_z_loss: float = 0.0  # weight of the largest logit's square (Baichuan 2: 2e-4)
    label_smoothing: float = 0.0  # share of the target that the whole vocabulary gets

    def validate(self) -> None:
        """Raises UserError for a share that is none."""
        check_smoothing(self.label_smoothing)

    def row_length(self, length: int) -> int:
        """One more than the inputs: the last is only a target."""
        return length + 1

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable | None = None,
        length: int | None = None,
    ) -> Example:
        """Shifts by one; a document's last target is the separator that begins the next.

        Targets that start a document are kept: the store puts one separator between documents, so
        predicting it is predicting the end. Targets in padding weigh nothing.
        """
        weights = ((segments[:, 1:] > 0) & (segments[:, :-1] > 0)).astype(np.float32)
        inputs = segments[:, :-1]
        if self.cross_documents:
            inputs = (inputs > 0).astype(np.int32)
        batch = Batch(
            tokens=tokens[:, :-1].astype(np.int32),
            positions=positions_in_segments(inputs),
            segments=inputs.astype(np.int32),
        )
        return Example(batch, TokenTargets(tokens[:, 1:].astype(np.int32), weights))

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an encoder, or a head that the loss does not fit."""
        require_causal(self, model)
        require_linear_head(self, model)

    @property
    def predicts_text(self) -> bool:
        """See `TextObjective.predicts_text`."""
        return True

    def regularisers(self) -> Regularisers:
        """See `TextObjective.regularisers`."""
        return Regularisers(self.z_loss, self.max_z_loss, self.label_smoothing)


def positions_in_segments(segments: Int[np.ndarray, "rows seq"]) -> Int[np.ndarray, "rows seq"]:
    """Positions that start again at 0 with every segment."""
    index = np.arange(segments.shape[1], dtype=np.int32)
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1).astype(np.int32)
