"""The base of the objectives on labels of whole texts: one text, or pair of texts, a row."""

from __future__ import annotations

import abc

from lmjax.config import config
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
