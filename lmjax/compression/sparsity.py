"""Choices of the weights of a dense layer that become zero.

Magnitude: the smallest ones. Wanda (Sun et al. 2023, arXiv:2306.11695): of each output, those with
the smallest |w| times the length of their input on calibration texts. SparseGPT (Frantar and
Alistarh 2023, arXiv:2301.00774): those whose loss the other weights can make up for best, which
they then do.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from jaxtyping import Bool, Float

from lmjax.compression.gptq import COLUMNS, inverse_factor
from lmjax.config import UserError

Matrix = Float[np.ndarray, "in out"]
Zeros = Bool[np.ndarray, "in out"]


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Share of the weights that become zero, and their pattern.

    Attributes:
      share: of the weights that become zero.
      group: consecutive inputs of an output, in each of which the share holds; None: there are no
        groups.
    """

    share: float
    group: int | None = None

    @staticmethod
    def of(share: float | None, pattern: str | None) -> Sparsity:
        """That of a share, or of a pattern as 2:4: two of each four inputs stay.

        Raises:
          UserError: no share from 0 to 1, no such pattern, or both and they differ.
        """
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"sparsity={share}: must be from 0 to 1")
        if pattern is None:
            return Sparsity(0.5 if share is None else share)
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        stay, group = map(int, found.groups()) if found else (0, 0)
        if not 0 < stay < group:
            raise UserError(
                f"pattern={pattern}: must be none, or as 2:4, where two of each four inputs stay"
            )
        own = 1 - stay / group
        if share is not None and share != own:
            raise UserError(f"sparsity={share}: pattern={pattern} has {own:g}; leave one of both")
        return Sparsity(own, group)

    @property
    def zeros(self) -> int:
        """Weights of a group that become zero."""
        return round(self.share * self.group)

    def smallest(self, scores: Matrix, by_output: bool) -> Zeros:
        """Mask of the weights with the smallest scores, each group on its own if there are any.

        Args:
          scores: of the weights; of equal ones the first goes.
          by_output: whether the weights of an output are compared, or those of all outputs.

        Raises:
          UserError: the inputs are no whole groups.
        """
        if self.group is not None:
            size, outputs = scores.shape
            if size % self.group:
                raise UserError(
                    f"pattern: a layer of {size} inputs has no whole groups of {self.group}; leave"
                    " it out by `matrices`"
                )
            grouped = scores.reshape(-1, self.group, outputs)
            return _lowest(grouped, self.zeros, 1).reshape(scores.shape)
        if by_output:
            return _lowest(scores, round(self.share * len(scores)), 0)
        flat = scores.reshape(-1)
        return _lowest(flat, round(self.share * flat.size), 0).reshape(scores.shape)


def _lowest(scores: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Mask of the `count` lowest along an axis."""
    order = np.argsort(scores, axis=axis, kind="stable")
    lowest = np.take(order, np.arange(count), axis=axis)
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, lowest, True, axis=axis)
    return mask


def magnitude(weight: Matrix, sparsity: Sparsity) -> Matrix:
    """The weight without its smallest entries."""
    return np.where(sparsity.smallest(np.abs(weight), by_output=False), 0, weight)


def wanda(weight: Matrix, second: Float[np.ndarray, "in in"], sparsity: Sparsity) -> Matrix:
    """The weight without the entries of the smallest |w| sqrt(mean x^2) (equation 1).

    Args:
      weight: of a dense layer.
      second: mean of x x^T over its inputs.
      sparsity: of each output.
    """
    scores = np.abs(weight) * np.sqrt(np.diag(second))[:, None]
    return np.where(sparsity.smallest(scores, by_output=True), 0, weight)


def sparsegpt(
    weight: Matrix,
    second: Float[np.ndarray, "in in"],
    sparsity: Sparsity,
    damping: float = 0.01,
) -> Matrix:
    """The weight with zeros, the rest changed so that x . weight stays near (algorithm 1).

    Args:
      weight: of a dense layer.
      second: mean of x x^T over its inputs; weights of inputs that are always zero go first.
      sparsity: of each 128 inputs, all outputs together, unless it has groups.
      damping: share of the mean of the diagonal that is added to it.

    Raises:
      UserError: the moments have no inverse, or the inputs are no whole groups.
    """
    size, group = len(weight), sparsity.group or 1
    upper = inverse_factor(second, damping)
    left = np.where(np.diag(second)[:, None] == 0, 0.0, weight)

    def importance(rows: slice) -> Matrix:
        return np.square(left[rows] / np.diag(upper)[rows, None])

    step = group * max(1, COLUMNS // group)
    for first in range(0, size, step):
        last = min(first + step, size)
        errors = np.zeros((last - first, left.shape[1]))
        zero = np.zeros(errors.shape, bool)
        if sparsity.group is None:
            zero = sparsity.smallest(importance(slice(first, last)), by_output=False)
        for i in range(first, last):
            if sparsity.group is not None and (i - first) % group == 0:
                own = slice(i, i + group)
                zero[i - first : i - first + group] = sparsity.smallest(importance(own), True)
            error = np.where(zero[i - first], left[i] / upper[i, i], 0)
            left[i] = np.where(zero[i - first], 0, left[i])
            left[i + 1 : last] -= np.outer(upper[i, i + 1 : last], error)
            errors[i - first] = error
        left[last:] -= upper[first:last, last:].T @ errors
    return left
