"""Sums over the inputs of a dense layer, of which calibration makes what it needs."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lmjax.models.weight_codes import largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputMoments:
    """Sums over the inputs x of a dense layer, each a vector over all of the layer's inputs.

    Of the layers of a stack of experts all have a first axis of experts.

    Attributes:
      products: of x x^T.
      magnitudes: of |x|.
      largest: the largest |x|; no sum.
      count: number of inputs.
    """

    products: Float[Array, "*experts in in"]
    magnitudes: Float[Array, "*experts in"]
    largest: Float[Array, "*experts in"]
    count: Float[Array, "*experts"]

    @staticmethod
    def of(
        x: Float[Array, "*rows_and_inputs"], axes: int, counted: Bool[Array, "rows"] | None = None
    ) -> InputMoments:
        """Those of one batch, whose last `axes` axes are the inputs; `counted`: some rows alone."""
        x = jax.reshard(x, jax.sharding.PartitionSpec())  # every device has the sums
        flat = x.astype(jnp.float32).reshape(-1, math.prod(x.shape[x.ndim - axes :]))
        if counted is not None:
            flat = jnp.where(counted[:, None], flat, 0)
        products = jnp.einsum("ni,nj->ij", flat, flat, precision="highest")
        count = len(flat) if counted is None else jnp.sum(counted)
        count = jnp.asarray(count, jnp.float32)
        return InputMoments(products, jnp.sum(jnp.abs(flat), axis=0), largest(flat, 0), count)

    def plus(self, other: InputMoments) -> InputMoments:
        """Of the inputs of both."""
        return InputMoments(
            self.products + other.products,
            self.magnitudes + other.magnitudes,
            jnp.maximum(self.largest, other.largest),
            self.count + other.count,
        )

    @property
    def second(self) -> Float[np.ndarray, "*experts in in"]:
        """Mean of x x^T; zeros for an expert without inputs."""
        count = np.maximum(np.asarray(self.count, np.float64), 1)
        return np.asarray(self.products, np.float64) / count[..., None, None]
