"""The contract between an objective, the loader that feeds it and the step that trains it."""

from __future__ import annotations

import abc
import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, UInt64

from lmjax.config import config
from lmjax.models.batch import Array, Batch
from lmjax.models.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Token-weighted sums over a batch; adding those of its parts gives those of the whole.

    Attributes:
      loss: sum of weight times loss, what is differentiated.
      weight: sum of weights, the one normaliser.
      extra: further sums for the metrics, e.g. the cross-entropy without its regulariser.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    extra: dict[str, Float[Array, ""]]


@config
class Objective(abc.ABC):
    """Base of the objectives."""

    @abc.abstractmethod
    def row_length(self, length: int) -> int:
        """Tokens of the store that one row of `length` inputs consumes."""

    @abc.abstractmethod
    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
    ) -> Batch:
        """Host part, in numpy: stored tokens to a batch.

        Args:
          tokens: consecutive tokens of the store.
          segments: which document of the row each belongs to, from 1; 0 is padding.
          seeds: one a row, for what is drawn at random; a function of the data plan alone.
        """

    @abc.abstractmethod
    def loss(self, model: Transformer, batch: Batch, key: PRNGKeyArray | None) -> Sums:
        """Device part: the batch's loss, as sums.

        Args:
          model: what is trained.
          batch: what `prepare` made, on the devices.
          key: for dropout; None when evaluating.
        """
