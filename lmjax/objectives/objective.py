"""The contract between an objective, the loader that feeds it and the step that trains it."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, PRNGKeyArray, UInt64

from lmjax.config import config
from lmjax.models.batch import Batch
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.lexicon import SHAPES_ONLY, Lexicon
from lmjax.objectives.prediction import Sums, predict

Preparation = Callable[
    [
        Int[np.ndarray, "rows row_length"],
        Int[np.ndarray, "rows row_length"],
        UInt64[np.ndarray, "rows"],
    ],
    Batch,
]


@config
class Objective(abc.ABC):
    """Base of the objectives."""

    @abc.abstractmethod
    def row_length(self, length: int) -> int:
        """Tokens of the store that one row of `length` inputs reads."""

    def row_overlap(self, length: int) -> int:
        """How many of them, from the end, the next row reads too. Here the last target alone."""
        return 1

    @abc.abstractmethod
    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: Lexicon,
        length: int,
    ) -> Batch:
        """Host part, in numpy: stored tokens to a batch.

        Args:
          tokens: consecutive tokens of the store.
          segments: which document of the row each belongs to, from 1; 0 is padding.
          seeds: one a row, for what is drawn at random; a function of the data plan alone.
          lexicon: the ids of special tokens, and what the others stand for.
          length: tokens that the model reads in a row; `tokens` has `row_length(length)`.

        Raises:
          UserError: the tokenizer lacks a token that is needed, or rows full of text hold nothing
            to predict.
        """

    def preparation(self, lexicon: Lexicon | None, length: int) -> Preparation:
        """`prepare` with all but the rows given; it can be sent to other processes."""
        return functools.partial(self.prepare, lexicon=lexicon, length=length)

    def shapes(self, rows: int, length: int) -> Batch:
        """A batch of padding, which has the shapes of all that come."""
        nothing = np.zeros((rows, self.row_length(length)), np.int32)
        seeds = np.zeros(rows, np.uint64)
        return self.prepare(nothing, nothing, seeds, SHAPES_ONLY, length)

    @abc.abstractmethod
    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a model that cannot be trained so."""

    @property
    def predicts_text(self) -> bool:
        """Whether each token is predicted once, from those before it: the loss measures the text.

        Only then bits per byte mean something. Where parts are hidden from a model that sees the
        rest, the loss says how well it finds them again, and compares models of one tokenizer.
        """
        return False

    def regularisers(self) -> tuple[float, float]:
        """Weights of log(Z)^2 and of the largest logit's square in the loss of targets."""
        return 0.0, 0.0

    def loss(self, model: Transformer, batch: Batch, key: PRNGKeyArray | None) -> Sums:
        """Device part: the batch's loss, as sums. Here the targets' cross-entropy in nats.

        Args:
          model: what is trained.
          batch: what `prepare` made, on the devices.
          key: for dropout; None when evaluating.

        Returns:
          The sums; those in `extra` are metrics of training by their names. Where an objective adds
          to the targets' cross-entropy, it names that "cross_entropy" there (see `Sums`).
        """
        hidden, _ = model(batch, key=key)
        return predict(model, hidden, batch, *self.regularisers())
