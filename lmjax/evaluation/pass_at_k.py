"""Share of problems that one of k programs solves, estimated without bias from more of them."""

from __future__ import annotations

import numpy as np

from lmjax.config import UserError


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that k of a problem's samples, drawn without putting back, have a right one.

    1 - C(samples - right, k) / C(samples, k) (Chen et al. 2021, arXiv:2107.03374, section 2.1),
    whose mean over samples is 1 - (1 - p)^k, where p is the chance of a right one; 1 - (1 -
    right / samples)^k is too small on average.

    Raises:
      UserError: not 0 <= right <= samples, or not 1 <= k <= samples.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise UserError(
            f"pass@{k} of {samples} samples, {right} of them right: k must be from 1 to the number"
            " of samples, and the right ones from 0 to it"
        )
    # The chance that all k are wrong, drawn one after another; a product that cannot overflow.
    drawn = np.arange(k)
    return float(1 - np.prod(np.maximum(samples - right - drawn, 0) / (samples - drawn)))
