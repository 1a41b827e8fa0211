"""Several objectives in one run, each row with one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.config import UserError, config
from lmjax.data.spans import RowSpans
from lmjax.models.infill import InfillFormat, join_formats
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.example import Example
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.masked_lm import NO_LABEL
from lmjax.objectives.objective import Sums, TextObjective, all_read_prefixes

CHOICE = 1  # the stream of random numbers that chooses; what is chosen draws from stream 0
NOTHING = {"labels": NO_LABEL}  # what rows have in a field that their objective lacks; else 0


@config
class Mixed(TextObjective):
    """Objectives in given shares; which one a row has follows from its seed.

    So GLM learns from blanks of tokens, sentences and documents, and UL2 from several denoisers.
    The loss is the first objective's, so that all must have the same. A row's text is as long as
    the one that takes most needs it; the others leave its end.
    """

    objectives: tuple[TextObjective, ...]  # what rows are trained on
    weights: tuple[float, ...]  # relative shares of the rows

    def validate(self) -> None:
        """Raises UserError for objectives that cannot share a run, or without weights above 0."""
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise UserError(
                f"there are {len(self.objectives)} objectives and {len(self.weights)} weights"
            )
        if min(self.weights) <= 0:
            raise UserError(f"the weights of objectives are {self.weights}; each must be above 0")
        names = ", ".join(type(objective).__name__ for objective in self.objectives)
        if any(isinstance(objective, Mixed) for objective in self.objectives):
            raise UserError(f"{names} cannot be mixed: name the objectives of a mixture themselves")
        losses = {(type(o).loss, type(o).loss_of_hidden, o.regularisers()) for o in self.objectives}
        if len(losses) > 1:
            raise UserError(
                f"{names} cannot be mixed: their losses differ (in kind, z_loss, max_z_loss or"
                " label_smoothing)"
            )

    def row_length(self, length: int) -> int:
        """The longest that one of the objectives takes."""
        return max(objective.row_length(length) for objective in self.objectives)

    def row_overlap(self, length: int) -> int:
        """The next row begins where it does for the one that goes on farthest."""
        advances = [o.row_length(length) - o.row_overlap(length) for o in self.objectives]
        return self.row_length(length) - max(advances)

    def infill_format(self) -> InfillFormat | None:
        """See `Objective.infill_format`."""
        return join_formats(objective.infill_format() for objective in self.objectives)

    @property
    def reads_prefix(self) -> bool:
        """See `Objective.reads_prefix`: of all objectives that continue texts."""
        return all_read_prefixes(self.objectives)

    def unaware_of_answers(self) -> tuple[str, ...]:
        """See `TextObjective.unaware_of_answers`."""
        return sum((objective.unaware_of_answers() for objective in self.objectives), ())

    def row_room(self, length: int) -> int:
        """Tokens that each of the objectives has room for."""
        return min(objective.row_room(length) for objective in self.objectives)

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`: whether one of the objectives does."""
        return any(objective.reads_spans for objective in self.objectives)

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model that does not fit every objective."""
        for objective in self.objectives:
            objective.check(model)

    def choose(self, seeds: UInt64[np.ndarray, "rows"]) -> Int[np.ndarray, "rows"]:
        """The number of each row's objective."""
        cumulative = np.cumsum(self.weights) / sum(self.weights)
        chosen = [RandomStream(seed, CHOICE).choices(cumulative, 1) for seed in seeds]
        return np.concatenate([np.zeros(0, np.int64), *chosen])

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
        spans: RowSpans | None = None,
    ) -> Example:
        """Makes each row with its objective."""
        chosen, parts = self.choose(seeds), []
        for number, objective in enumerate(self.objectives):
            rows = np.flatnonzero(chosen == number)
            own = slice(objective.row_length(length))
            further = {}
            if objective.reads_spans and spans is not None:
                further["spans"] = spans.take(rows)
            part = objective.prepare(
                tokens[rows, own], segments[rows, own], seeds[rows], lexicon, length, **further
            )
            parts.append((rows, part))
        return join(len(tokens), parts)

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """The loss that all objectives have."""
        return self.objectives[0].loss(model, example, key, frozen)

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """See `Objective.loss_of_hidden`: the loss that all objectives have."""
        return self.objectives[0].loss_of_hidden(model, hidden, example, key)


def join(rows: int, parts: list[tuple[Int[np.ndarray, "_"], Any]]) -> Any:
    """One example of several, each with the numbers of its rows.

    Goes through the fields of dataclasses (an example, a batch, targets); a field that only some
    of the parts have is padding in the rows of the others.
    """
    kind, fields = type(parts[0][1]), {}
    for name in (field.name for field in dataclasses.fields(kind)):
        found = [(where, getattr(part, name)) for where, part in parts]
        found = [(where, values) for where, values in found if values is not None]
        if not found:
            continue
        if dataclasses.is_dataclass(found[0][1]):
            fields[name] = join(rows, found)
            continue
        inner = np.max([values.shape[1:] for _, values in found], axis=0).tolist()
        joined = np.full((rows, *inner), NOTHING.get(name, 0), found[0][1].dtype)
        if name == "ranks":
            joined[:] = np.arange(*inner)
        for where, values in found:
            joined[(where, *map(slice, values.shape[1:]))] = values
        fields[name] = joined
    return kind(**fields)
