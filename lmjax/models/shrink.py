"""Smaller gradients for what a part of the model makes, at unchanged values."""

import jax
from jaxtyping import Array, Float


def shrink_gradient(
    x: Float[Array, "..."], factor: float | Float[Array, ""]
) -> Float[Array, "..."]:
    """The values of `x`, whose gradient is multiplied by `factor`.

    GLM-130B trains its token embeddings so, with a factor of 0.1, against spikes of the loss (Zeng
    et al. 2022, arXiv:2210.02414, section 2.3: factor x + (1 - factor) stop_gradient(x)).
    """
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)  # exactly x: the difference is 0
