"""The base of objectives that add something to the loss of another."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from lmjax.config import config
from lmjax.models.infill import InfillFormat
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.example import Example
from lmjax.objectives.objective import Objective


@config
class ExtendedObjective(Objective):
    """Another objective with more in its loss; a subclass defines `loss`."""

    objective: Objective  # whose loss is added to

    def check(self, model: TransformerConfig) -> None:
        """See `Objective.check`."""
        self.objective.check(model)

    def infill_format(self) -> InfillFormat | None:
        """See `Objective.infill_format`."""
        return self.objective.infill_format()

    @property
    def reads_prefix(self) -> bool:
        """See `Objective.reads_prefix`: that of the objective."""
        return self.objective.reads_prefix

    @property
    def counts(self) -> str:
        """See `Objective.counts`: that of the objective."""
        return self.objective.counts

    def normalise(self, example: Example) -> Example:
        """See `Objective.normalise`."""
        return self.objective.normalise(example)

    def batch_sums(self, model: Transformer, example: Example, frozen: Any = None) -> Any:
        """See `Objective.batch_sums`."""
        return self.objective.batch_sums(model, example, frozen)

    def with_batch_sums(self, example: Example, sums: Any) -> Example:
        """See `Objective.with_batch_sums`."""
        return self.objective.with_batch_sums(example, sums)

    def weight(self, example: Example) -> Float[Array, ""]:
        """See `Objective.weight`."""
        return self.objective.weight(example)
