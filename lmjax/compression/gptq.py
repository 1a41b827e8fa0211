"""GPTQ: weights rounded one input after another, the rest making up for each error.

Frantar et al. 2022 (arXiv:2210.17323), algorithm 1.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lmjax.config import UserError
from lmjax.models.number_codes import IntegerCode
from lmjax.models.weight_codes import Grid, Stored

COLUMNS = 128  # inputs whose errors are passed on to the rest at once


def gptq(
    weight: Float[np.ndarray, "in out"],
    second: Float[np.ndarray, "in in"],
    code: IntegerCode,
    damping: float = 0.01,
    by_activation: bool = True,
) -> Stored:
    """Codes and scales of a weight with which x . weight changes little on calibration inputs.

    Inputs that are always zero keep nothing: their weights become the nearest ones.

    Args:
      weight: of a dense layer.
      second: mean of x x^T over its inputs.
      code: integers, whose blocks run along the inputs.
      damping: share of the mean of the diagonal that is added to it.
      by_activation: inputs of large second moments are rounded first. Scales are then those of the
        weight as it is, so that blocks stay neighbours; otherwise of what is left of it where a
        block begins.
    """
    size = len(weight)
    block = code.of(size)
    order = np.arange(size)
    if by_activation:
        order = np.argsort(-np.diag(second), kind="stable")
    grid = _fitted(code, weight)
    upper = inverse_factor(second[np.ix_(order, order)], damping)
    left = weight[order].astype(np.float64)
    kept = np.empty_like(left)
    step = min(size, block * -(-COLUMNS // block))  # whole blocks
    for first in range(0, size, step):
        last = min(first + step, size)
        errors = np.empty((last - first, left.shape[1]))
        for i in range(first, last):
            if not by_activation and i % block == 0:
                found = _fitted(code, left[i : i + block])
                for part, own in zip(grid, found):
                    if part is not None:
                        part[i // block] = own[0]
            own = Grid(*(part if part is None else part[order[i] // block] for part in grid))
            kept[i] = n = _nearest(code, left[i], own)
            value = (n if own.zero is None else n - own.zero) * own.scale
            errors[i - first] = (left[i] - value) / upper[i, i]
            left[i + 1 : last] -= np.outer(upper[i, i + 1 : last], errors[i - first])
        left[last:] -= upper[first:last, last:].T @ errors
    back = np.empty_like(order)
    back[order] = np.arange(size)
    whole = Grid(*(part if part is None else jnp.asarray(part) for part in grid))
    return code.stored(jnp.asarray(kept[back], jnp.float32), whole, 0)


def inverse_factor(second: Float[np.ndarray, "in in"], damping: float) -> np.ndarray:
    """Upper U with U^T U the inverse of the damped matrix; an input of zeros has 1 on the diagonal.

    Raises:
      UserError: there is none, which more damping would change.
    """
    diagonal = np.diag(second)
    damped = second + np.diag(np.where(diagonal == 0, 1.0, damping * diagonal.mean()))
    try:
        return np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        raise UserError(
            f"damping={damping:g}: inputs of a layer depend on each other so closely that their"
            " second moments have no inverse; give more, as in damping=0.1"
        ) from None


def _fitted(code: IntegerCode, weight: Float[np.ndarray, "in out"]) -> Grid:
    """Scales and zeros of a weight's blocks, on the host."""
    grid = code.fit(jnp.asarray(weight, jnp.float32), 0)
    return Grid(*(part if part is None else np.array(part) for part in grid))


def _nearest(code: IntegerCode, row: Float[np.ndarray, "out"], grid: Grid) -> np.ndarray:
    """As `IntegerCode.nearest`, on the host."""
    n = np.round(row / np.where(grid.scale == 0, 1, grid.scale))
    return np.clip(n if grid.zero is None else n + grid.zero, code.lowest, code.highest)
