"""The base of the objectives on labels of whole texts: one text, or pair of texts, a row."""

from __future__ import annotations

import abc

import numpy as np
from jaxtyping import Bool, Int

from lmjax.config import config
from lmjax.models.batch import Batch
from lmjax.objectives.objective import TextObjective


@config
class SingleTextObjective(TextObjective, abc.ABC):
    """Base of the objectives that read one text with its labels in a row of data.rows=groups.

    Spans say what the parts of the text are, such as the second text of a pair. A text that is too
    long keeps its beginning.
    """

    @property
    def slots(self) -> int:
        """See `TextObjective.slots`."""
        return 1

    @property
    def keeps_begin(self) -> bool:
        """See `TextObjective.keeps_begin`."""
        return True

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`."""
        return True

    def row_length(self, length: int) -> int:
        """See `TextObjective.row_length`."""
        return length

    @property
    def predicts_words(self) -> bool:
        """See `TextObjective.predicts_words`."""
        return False


def batch_of_texts(
    tokens: Int[np.ndarray, "rows row_length"],
    segments: Int[np.ndarray, "rows row_length"],
    second: Bool[np.ndarray, "rows row_length"] | None = None,
) -> Batch:
    """The batch of rows of one text each, whose tokens at `second` have token type 1."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    types = np.zeros(tokens.shape, np.int32) if second is None else second.astype(np.int32)
    return Batch(
        tokens=tokens.astype(np.int32),
        positions=positions.copy(),
        segments=(segments > 0).astype(np.int32),
        token_types=types,
    )
