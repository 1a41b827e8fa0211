"""Calibration: whether answers that a model is 80% sure of are right in 80% of cases."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lmjax.config import UserError
from lmjax.console import Table

COLUMNS = ("answers", "share", "predicted", "agreement")
CAPTION = (
    "Answers by the probability that the model gives to them: their share of all, its mean, and the"
    " share of them that are right. Of a calibrated model both are equal in each row."
)


class Reliability(NamedTuple):
    """Answers by their confidence, in bins of equal width from 0 to 1.

    Attributes:
      counts: answers in each bin.
      confidence: their mean confidence; NaN in an empty bin.
      accuracy: the share of them that are right; NaN in an empty bin.
    """

    counts: Int[np.ndarray, "bins"]
    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]

    @property
    def error(self) -> float:
        """Expected calibration error: |accuracy - confidence| of the bins, a mean over answers.

        (Guo et al. 2017, arXiv:1706.04599, equation 3.) It depends on the number of bins, and of
        few answers is above 0 for a calibrated model too.
        """
        there = self.counts > 0
        gaps = np.abs(self.accuracy - self.confidence)[there]
        return float(np.average(gaps, weights=self.counts[there]))

    def table(self, of: str, title: str = "Calibration") -> Table:
        """The bins as a table, which the report draws.

        Args:
          of: the answers, such as the name of their task.
          title: of the table.
        """
        edges = np.linspace(0, 1, len(self.counts) + 1)
        rows = tuple(
            (f"{of}, {low:.2f} to {high:.2f}", *map(float, numbers))
            for low, high, *numbers in zip(
                edges[:-1],
                edges[1:],
                self.counts / self.counts.sum(),
                self.confidence,
                self.accuracy,
                strict=True,
            )
            if numbers[0]
        )
        return Table(title, COLUMNS, rows, CAPTION, picture="calibration")


def reliability(
    confidence: Float[np.ndarray, "answers"], right: Bool[np.ndarray, "answers"], bins: int = 10
) -> Reliability:
    """Sorts answers by their confidence.

    Args:
      confidence: probability that the model gives to the answer it chooses.
      right: whether it is the right one.
      bins: each has its upper edge, but not its lower one (the first has both).

    Raises:
      UserError: there is no answer, or a confidence is no probability.
    """
    if not len(confidence) or bins < 1:
        raise UserError(
            f"calibration of {len(confidence)} answers in {bins} bins: give one or more"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        bad = confidence[~((confidence >= 0) & (confidence <= 1))][0]
        raise UserError(f"calibration: a confidence is {bad}; it must be from 0 to 1")
    inside = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(inside, minlength=bins)
    sums = [np.bincount(inside, value, bins) for value in (confidence, right.astype(float))]
    with np.errstate(invalid="ignore"):
        return Reliability(counts, *(total / counts for total in sums))


def choice_confidence(
    log_likelihoods: Float[np.ndarray, "questions choices"],
) -> Float[np.ndarray, "questions"]:
    """Probability of the likeliest choice among all choices of a question.

    Args:
      log_likelihoods: of the choices, in nats; -inf where a question has fewer.

    Raises:
      UserError: a question has NaN, or no choice.
    """
    best = log_likelihoods.max(axis=1)
    if not np.isfinite(best).all():
        number = int(np.flatnonzero(~np.isfinite(best))[0])
        raise UserError(f"calibration: question {number}: {log_likelihoods[number].tolist()}")
    return 1 / np.exp(log_likelihoods - best[:, None]).sum(axis=1)
