"""Scales of inputs that make weights easier to round: AWQ's, found by search, and SmoothQuant's.

AWQ (Lin et al. 2023, arXiv:2306.00978): inputs that are large on calibration texts get larger
weights, whose rounding then counts less. SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): where
inputs are rounded too, the weights take over a part of their range.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lmjax.compression.input_moments import InputMoments
from lmjax.models.weight_codes import WeightCode

RATIOS = 20  # exponents from 0 to 1 that AWQ tries
SMALLEST = 1e-4  # of what a scale is made of


def output_error(
    difference: Float[np.ndarray, "in out"], second: Float[np.ndarray, "in in"]
) -> float:
    """Mean over inputs x of the squared length of x . difference."""
    return float(np.sum(difference * (second @ difference)))


def rounded(weight: Float[np.ndarray, "in out"], code: WeightCode) -> np.ndarray:
    """The weight that is kept of a weight, the nearest."""
    stored = code.encode(jnp.asarray(weight, jnp.float32), 0)
    return np.asarray(code.decode(stored, 0, len(weight)))


def awq_scale(
    weights: list[np.ndarray], moments: InputMoments, code: WeightCode
) -> Float[np.ndarray, "in"]:
    """Scale (mean |x|)^ratio of each input, the ratio with the least error of the outputs.

    Args:
      weights: of all layers that read these inputs.
      moments: of the inputs.
      code: how the weights are kept.
    """
    magnitude = np.asarray(moments.magnitudes, np.float64) / float(moments.count)
    magnitude = np.maximum(magnitude, SMALLEST)
    second, best, least = moments.second, np.ones_like(magnitude), np.inf
    for step in range(RATIOS):
        scale = magnitude ** (step / RATIOS)
        scale = np.maximum(scale / np.sqrt(np.max(scale) * np.min(scale)), SMALLEST)
        error = sum(
            output_error(rounded(w * scale[:, None], code) / scale[:, None] - w, second)
            for w in weights
        )
        if error < least:
            best, least = scale, error
    return best.astype(np.float32)


def smoothing_scale(
    weights: list[np.ndarray], moments: InputMoments, alpha: float
) -> Float[np.ndarray, "in"]:
    """Scale max |x|^alpha / max |w|^(1 - alpha) of each input (equation 4).

    Args:
      weights: of all layers that read these inputs.
      moments: of the inputs.
      alpha: share of the difficulty that the weights take over.
    """
    of_inputs = np.maximum(np.asarray(moments.largest, np.float64), SMALLEST)
    of_weights = np.maximum(np.max([np.max(np.abs(w), axis=1) for w in weights], axis=0), SMALLEST)
    return (of_inputs**alpha / of_weights ** (1 - alpha)).astype(np.float32)
