"""Auxiliary losses of blocks, whose gradients and measures leave through the backward pass.

A block is a function from activations to activations wherever it runs: in a scan over layers, in a
loop, in a stage of a pipeline, under rematerialisation. So an auxiliary loss has no output of its
own. `Auxiliary.attach` returns the activations as they are; in backward it adds the gradient of the
loss, and gives the sums that are measured as the gradient of an argument of zeros (a tap), which is
summed over microbatches and devices like any other gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.manual_axes import vary_alike


class Auxiliary(NamedTuple):
    """Auxiliary losses and measures of one layer, or of layers stacked along a first axis.

    Attributes:
      factor: of the loss, which is a sum over tokens. With the weight of a batch's targets over the
        number of its tokens, the trained loss has the mean over tokens added, in any microbatches.
      tap: zeros, whose gradient is the sums.
    """

    factor: Float[Array, "*layers"]
    tap: Float[Array, "*layers sums"]

    def attach(
        self,
        x: Float[Array, "batch seq embed"],
        loss: Float[Array, ""],
        sums: Float[Array, "sums"],
    ) -> Float[Array, "batch seq embed"]:
        """Activations x, whose backward pass adds the gradient of factor * loss, and the sums.

        It does so wherever a gradient goes through x, whatever its value.
        """
        tap, sums = vary_alike((self.tap, sums))
        return _attach(x, loss * self.factor, tap, jax.lax.stop_gradient(sums))


@jax.custom_vjp
def _attach(x, loss, tap, sums):
    return x


def _forward(x, loss, tap, sums):
    return x, (loss, sums)


def _backward(kept, gradient):
    loss, sums = kept
    return gradient, jnp.ones_like(loss), sums, jnp.zeros_like(sums)


_attach.defvjp(_forward, _backward)
