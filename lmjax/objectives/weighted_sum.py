"""Sum of several losses of one model, each on inputs of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, UInt64

from lmjax.config import UserError, config
from lmjax.data.spans import RowSpans
from lmjax.models.batch import Array, Batch
from lmjax.models.infill import InfillFormat, join_formats
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.example import Example
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import (
    Objective,
    Sums,
    TextObjective,
    all_read_prefixes,
    head_key,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """Targets of one objective of a sum.

    Attributes:
      targets: of the objective's own type.
      scale: factor of its summed loss, the same for all rows.
    """

    targets: Any
    scale: Float[Array, "*batch"]


@config
class WeightedSum(TextObjective):
    """Sum of the mean losses of several objectives, each with a weight.

    L = sum over i of weights[i] * (loss of objective i, summed over its targets, over the sum of
    their weights in the whole batch). So PPO keeps to the pretraining text (PPO-ptx; Ouyang et al.
    2022, arXiv:2203.02155, equation 2). The mean is that of the whole batch, whatever microbatches
    it is computed in. `Example.inputs` and `Example.targets` are tuples with one element an
    objective. Where `Example.inputs` is one `Batch`, all objectives have the hidden states of one
    forward pass over it, as several heads of one model, or GPT-1's labels with language modelling
    as an auxiliary objective (Radford et al. 2018, section 3.2, weight 0.5). "tokens" counts the
    targets of all.
    """

    objectives: tuple[Objective, ...]  # terms of the sum
    weights: tuple[float, ...]  # factor of each term's mean loss

    def validate(self) -> None:
        """Raises UserError for other than one weight above 0 for each objective."""
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise UserError(
                f"there are {len(self.objectives)} objectives and {len(self.weights)} weights"
            )
        if min(self.weights) <= 0:
            raise UserError(f"the weights of objectives are {self.weights}; each must be above 0")

    def row_length(self, length: int) -> int:
        """Length of the longest row that one of the objectives reads."""
        return max(objective.row_length(length) for objective in self._text_objectives())

    def row_overlap(self, length: int) -> int:
        """Tokens that the next row reads again, so that no objective leaves text out."""
        advances = [
            objective.row_length(length) - objective.row_overlap(length)
            for objective in self._text_objectives()
        ]
        return self.row_length(length) - min(advances)

    def infill_format(self) -> InfillFormat | None:
        """See `Objective.infill_format`."""
        return join_formats(objective.infill_format() for objective in self.objectives)

    @property
    def reads_prefix(self) -> bool:
        """See `Objective.reads_prefix`: of all objectives that continue texts."""
        return all_read_prefixes(self.objectives)

    def unaware_of_answers(self) -> tuple[str, ...]:
        """See `TextObjective.unaware_of_answers`."""
        return sum((objective.unaware_of_answers() for objective in self._text_objectives()), ())

    def row_room(self, length: int) -> int:
        """Tokens that each of the objectives has room for."""
        return min(objective.row_room(length) for objective in self._text_objectives())

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`: whether one of the objectives does."""
        return any(objective.reads_spans for objective in self._text_objectives())

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model that does not fit every objective."""
        for objective in self.objectives:
            objective.check(model)

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
        spans: RowSpans | None = None,
    ) -> Example:
        """Makes an example of the same rows for each objective."""
        examples = []
        for objective in self._text_objectives():
            own = slice(objective.row_length(length))
            further = {"spans": spans} if objective.reads_spans else {}
            examples.append(
                objective.prepare(
                    tokens[:, own], segments[:, own], seeds, lexicon, length, **further
                )
            )
        return join_examples(examples)

    def normalise(self, example: Example) -> Example:
        """The example with each term's factor, from the weights of all its rows."""
        whole, scaled = self.weight(example), []
        terms = zip(self.objectives, self.weights, split_example(example), strict=True)
        for objective, weight, term in terms:
            own = objective.weight(term)
            # A term without targets adds nothing; the others have their means all the same.
            scale = weight * whole / jnp.where(own > 0, own, 1)
            targets = objective.normalise(term).targets
            rows = jax.tree.leaves(targets)[0].shape[:1]
            scaled.append(Term(targets, jnp.broadcast_to(scale, rows)))
        return Example(example.inputs, tuple(scaled))

    def weight(self, example: Example) -> Float[Array, ""]:
        """Sum of the weights of all targets."""
        terms = zip(self.objectives, split_example(example), strict=True)
        return sum(objective.weight(term) for objective, term in terms)

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums of the terms; `extra` has the mean loss of each as "loss_1", "loss_2", ...

        The metrics of a term have its number too, and are means over its own targets.
        """
        hidden = None
        if isinstance(example.inputs, Batch):
            hidden, _ = model(example.inputs, key=key)
        loss, weight, extra = 0.0, 0.0, {}
        for number, (objective, term) in enumerate(zip(self.objectives, split_example(example))):
            own = Example(term.inputs, term.targets.targets)
            if hidden is None:
                sums = objective.loss(model, own, key, frozen)
            else:
                sums = objective.loss_of_hidden(model, hidden, own, head_key(key))
            scale = term.targets.scale[0]
            means = {"loss": sums.loss, **sums.extra}
            means = {name: total * scale / self.weights[number] for name, total in means.items()}
            extra |= {f"{name}_{number + 1}": mean for name, mean in means.items()}
            loss, weight = loss + sums.loss * scale, weight + sums.weight
        return Sums(loss, weight, extra)

    def _text_objectives(self) -> tuple[TextObjective, ...]:
        for objective in self.objectives:
            if not isinstance(objective, TextObjective):
                raise UserError(
                    f"{type(objective).__name__} makes no examples from text, so a sum with it "
                    "cannot be pretrained on"
                )
        return self.objectives


def join_examples(examples: list[Example]) -> Example:
    """One example of a sum from an example of each objective."""
    return Example(
        tuple(example.inputs for example in examples),
        tuple(example.targets for example in examples),
    )


def split_example(example: Example) -> list[Example]:
    """An example of each objective from one of the sum."""
    targets, inputs = example.targets, example.inputs
    inputs = (inputs,) * len(targets) if isinstance(inputs, Batch) else inputs
    return [Example(*pair) for pair in zip(inputs, targets, strict=True)]
