"""Measures of continual learning: what training on one task does to the scores on others."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class ScoreMatrix:
    """Scores of one kind on every set after every stage of training (Lopez-Paz and Ranzato 2017).

    The paper (arXiv:1706.08840, section 2) has one set a stage; here a stage may have any number.

    Attributes:
      scores: after each stage, on each set; NaN where there is none.
      learnt: number of the stage, from 0, that trained on each set first.
      untrained: scores of a model with random parameters, on each set.
      more_is_better: whether a larger score is better. Where it is not, as with losses, transfer
        is the fall of the score: a gain is always above 0.
    """

    scores: Float[np.ndarray, "stages sets"]
    learnt: tuple[int, ...]
    untrained: Float[np.ndarray, "sets"]
    more_is_better: bool

    def average(self) -> float | None:
        """Mean score of the sets after the last stage ("ACC"); None where there is none."""
        return _mean(self.scores[-1])

    def backward_transfer(self) -> float | None:
        """Mean gain of the last stage's scores over those right after each set was learnt ("BWT").

        Below 0 it is forgetting. Sets of the last stage do not count; None where there are no
        others.
        """
        last = len(self.scores) - 1
        gains = [
            self.scores[last, n] - self.scores[stage, n]
            for n, stage in enumerate(self.learnt)
            if stage < last
        ]
        return _mean(self._sign * np.array(gains))

    def forward_transfer(self) -> float | None:
        """Mean gain of the scores right before a set is learnt over random parameters ("FWT").

        Sets of the first stage do not count; None where there are no others.
        """
        gains = [
            self.scores[stage - 1, n] - self.untrained[n]
            for n, stage in enumerate(self.learnt)
            if stage > 0
        ]
        return _mean(self._sign * np.array(gains))

    @property
    def _sign(self) -> int:
        return 1 if self.more_is_better else -1


def _mean(values: Float[np.ndarray, "_"]) -> float | None:
    """Mean of the values that are there."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None
