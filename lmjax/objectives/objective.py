"""The contract between an objective, the loader that feeds it and the step that trains it."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt64

from lmjax.config import UserError, config
from lmjax.data.rows import RowFormat
from lmjax.models.infill import InfillFormat
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.example import Example
from lmjax.objectives.lexicon import SHAPES_ONLY, TokenTable
from lmjax.objectives.prediction import Regularisers, Sums, predict

HEAD = 0x4EAD
Preparation = Callable[..., Example]  # of tokens, segments, seeds; `spans` where they are read


@config
class Objective:
    """Base of all objectives: the loss of a model on examples.

    One has `loss_of_hidden` where its loss is that of one forward pass, which several objectives of
    a `WeightedSum` may share; otherwise `loss`.
    """

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """Sums of the loss over the rows of an example, on the devices.

        Args:
          model: the model that is trained.
          example: inputs and targets.
          key: randomness for dropout; None when evaluating.
          frozen: models that are read and not trained, by name (a reference policy, a teacher).

        Returns:
          The sums; those in `extra` are metrics of training by their names. Where an objective adds
          to the targets' cross-entropy, it names that "cross_entropy" there (see `Sums`).
        """
        hidden, _ = model(example.inputs, key=key)
        return self.loss_of_hidden(model, hidden, example, head_key(key))

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Sums of the loss, from what the model gives for the example's inputs; see `loss`.

        `key` is for dropout of what comes after the hidden states.

        Raises:
          UserError: the objective runs the model itself.
        """
        raise UserError(
            f"{type(self).__name__} runs the model itself: it cannot share inputs with others"
        )

    def normalise(self, example: Example) -> Example:
        """The example with what its loss needs to know of all its rows; here as it is.

        Called once a step, on the devices, before the rows are divided into microbatches.
        """
        return example

    def batch_sums(self, model: Transformer, example: Example, frozen: Any = None) -> Any:
        """Sums over rows on which the loss of every row of a batch depends; None: on nothing so.

        Called after `normalise`, without gradients, where a batch is divided into microbatches: on
        each of these, and the sums are added up. Otherwise `loss` has all rows at hand.
        """
        return None

    def with_batch_sums(self, example: Example, sums: Any) -> Example:
        """The example with the sums of the whole batch, as arrays whose first axis is the rows."""
        return example

    @property
    def counts(self) -> str:
        """Name of what the targets' weights count, in the metrics too."""
        return "tokens"

    def weight(self, example: Example) -> Float[Array, ""]:
        """Sum of the weights of the targets: `Sums.weight`, known before the model has run."""
        return jnp.sum(example.targets.weights)

    def infill_format(self) -> InfillFormat | None:
        """The form in which the model learns to fill blanks; None: it continues texts."""
        return None

    @property
    def reads_prefix(self) -> bool:
        """Returns whether a text's beginning sees itself both ways where the model continues it."""
        return False

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model that cannot be trained with this objective."""


@config
class TextObjective(Objective, abc.ABC):
    """Base of the objectives that make their examples from rows of stored text.

    A subclass defines `row_length` and `prepare`, and raises UserError in `check` for models that
    it cannot train. One whose model sees both sides of a token (attention.causal=False) says in
    `infill_format` how the model fills blanks; without it the trained model generates nothing.
    """

    @abc.abstractmethod
    def row_length(self, length: int) -> int:
        """Tokens of the store that one row of `length` inputs reads."""

    def row_overlap(self, length: int) -> int:
        """Tokens at the end of a row that the next row reads too: here the last target alone."""
        return 1

    @abc.abstractmethod
    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
    ) -> Example:
        """Makes an example from stored tokens, on the host, in numpy.

        Args:
          tokens: consecutive tokens of the store.
          segments: number of the document in the row that each token is of, from 1; 0 is padding.
          seeds: one a row, for random choices; a function of the data plan alone.
          lexicon: ids of special tokens (`lexicon.token("[MASK]")`), and the text that the others
            stand for.
          length: tokens that the model reads in a row; `tokens` has `row_length(length)`.

        Raises:
          UserError: the tokenizer lacks a token that is needed, or rows full of text hold nothing
            to predict.
        """

    def preparation(self, lexicon: TokenTable | None, length: int) -> Preparation:
        """`prepare` with all but the rows given; it can be sent to other processes."""
        return functools.partial(self.prepare, lexicon=lexicon, length=length)

    def shapes(self, rows: int, length: int) -> Example:
        """An example of padding, which has the shapes of all others."""
        nothing = np.zeros((rows, self.row_length(length)), np.int32)
        seeds = np.zeros(rows, np.uint64)
        return self.prepare(nothing, nothing, seeds, SHAPES_ONLY, length)

    def row_room(self, length: int) -> int:
        """Tokens of whole documents that a row nearly always has room for."""
        row_length = self.row_length(length)
        return min(row_length, row_length - self.row_overlap(length) + 1)

    def row_format(self, length: int) -> RowFormat:
        """Format of the rows of the store that `length` inputs are made of."""
        return RowFormat(
            length=self.row_length(length),
            overlap=self.row_overlap(length),
            room=self.row_room(length),
            slots=self.slots,
            keeps_begin=self.keeps_begin,
            reads_spans=self.reads_spans,
            replies_apart=self.replies_apart,
        )

    def packed(self, example: Example, fit_rows: Callable[[int], int]) -> Example:
        """The same loss in fewer rows, on the host in numpy; here the example as it is.

        Called before each step for rows of one document in each slot (`slots`).

        Args:
          example: as `prepare` has made it.
          fit_rows: rows that are needed -> rows that the example gets, at least as many.
        """
        return example

    @property
    def reads_spans(self) -> bool:
        """Returns whether `prepare` takes `spans`: answers and turns of the rows (`RowSpans`)."""
        return False

    @property
    def slots(self) -> int | None:
        """Documents of a row (data.rows=groups), with their labels; None: rows are text.

        With a number, `prepare` takes `labels`: those of the documents, [rows, slots, labels].
        """
        return None

    @property
    def keeps_begin(self) -> bool:
        """Returns whether a document that is longer than its slot keeps its beginning, not its end.

        Its last token, which may close it, stays too.
        """
        return False

    @property
    def replies_apart(self) -> bool:
        """Returns whether requests and replies have room in a row apart, `row_room` each."""
        return False

    @property
    def predicts_words(self) -> bool:
        """Returns whether the model's head of words is read."""
        return True

    @property
    def predicts_text(self) -> bool:
        """Returns whether each token is predicted once, from those before it.

        Only then the loss measures the text, and bits per byte mean something. Where parts are
        hidden from a model that sees the rest, the loss says how well it finds them again, and
        compares models of one tokenizer.
        """
        return False

    def unaware_of_answers(self) -> tuple[str, ...]:
        """Names of the objectives, of several in one, that learn answers' marks as text.

        Sources of prompts put special tokens around answers (`lmjax.data.JsonPrompts`).
        """
        return (type(self).__name__,)

    def regularisers(self) -> Regularisers:
        """Regularisers of the loss of targets."""
        return Regularisers()

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Cross-entropy of the targets in nats; see `Objective.loss_of_hidden`."""
        return predict(model, hidden, example.targets, self.regularisers())


def head_key(key: PRNGKeyArray | None) -> PRNGKeyArray | None:
    """A key for dropout after the hidden states, apart from those that the model makes of `key`."""
    return None if key is None else jax.random.fold_in(key, HEAD)


def all_read_prefixes(objectives: Iterable[Objective]) -> bool:
    """Returns whether all objectives that continue texts, one or more, see a prefix both ways."""
    found = [one.reads_prefix for one in objectives if one.infill_format() is None]
    return bool(found) and all(found)
