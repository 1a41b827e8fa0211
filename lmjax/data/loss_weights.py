"""Weights of conversations in the loss, by a field of their lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from lmjax.config import UserError, config
from lmjax.data.store import TokenStore


@config
class LossWeights:
    """Weights of conversations in the training loss, by their class or source (C-RLFT).

    OpenChat learns from conversations of mixed quality so: those of GPT-4 with weight 1, those of
    GPT-3.5 with 0.1 (Wang et al. 2023, arXiv:2309.11235, section 3.2). Held-out loss has none.
    """

    field: str  # of the lines, also named in the source's metadata: a class, or the weight itself
    weights: tuple[tuple[str, float], ...] = ()  # classes with their weights; none: the field's
    other: float | None = None  # of further classes, and of lines without the field; none: an error

    def validate(self) -> None:
        """Raises UserError for a weight that is none, or a class that is named twice."""
        names = [name for name, _ in self.weights]
        if len(set(names)) < len(names):
            raise UserError(f"loss_weights.weights={self.weights}: give each class once")
        for weight in (*(weight for _, weight in self.weights), self.other or 0.0):
            if not 0 <= weight < math.inf:
                raise UserError(f"loss_weights: {weight} is no weight; it must be 0 or more")

    def of_documents(self, store: TokenStore) -> Float32[np.ndarray, "documents"]:
        """The weight of each document of a store.

        Raises:
          UserError: a document has none, or all are 0.
        """
        known = dict(self.weights)
        count = store.manifest.documents
        found = [self._of(store.metadata(number), known, number) for number in range(count)]
        weights = np.array(found, np.float32)
        if count and not weights.any():
            raise UserError(f"loss_weights: every conversation of {store.folder} has the weight 0")
        return weights

    def _of(self, metadata: Mapping[str, Any], known: Mapping[str, float], number: int) -> float:
        value = metadata.get(self.field)
        if isinstance(value, str) and value in known:
            return known[value]
        if not known and isinstance(value, int | float) and 0 <= value < math.inf:
            return float(value)
        if self.other is not None:
            return self.other
        wanted = f"one of {', '.join(known)}" if known else "a number of 0 or more"
        raise UserError(
            f"loss_weights: conversation {number} has {self.field}={value!r}, which is not"
            f" {wanted}; loss_weights.other gives the weight of all others"
        )
