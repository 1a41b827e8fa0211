"""Products of integers of 8 bits: inputs of dense layers are rounded as their weights are (W8A8).

y = scale_x scale_w (n_x . n_w), summed in int32. Scales of inputs are those of each token, or one
that calibration found for the layer (Jacob et al. 2018, arXiv:1712.05877; Xiao et al. 2022,
arXiv:2211.10438).
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lmjax.config import UserError, config
from lmjax.models.number_codes import Int8
from lmjax.models.quantized import WeightForm
from lmjax.models.weight_codes import Stored, WeightCode, largest
from pallas_kernels.target import target

MOST = 127
ROWS = 8  # for fewer rows XLA's CPU product converts the whole weight first


@config
class ActivationCode(abc.ABC):
    """Base of the ways to round inputs of dense layers to integers."""

    def check(self, weights: WeightCode) -> None:
        """Raises UserError for weights that no product of integers can have."""
        if not isinstance(weights, Int8) or not weights.symmetric or weights.block is not None:
            raise UserError(
                f"quantization.activations={type(self).__name__}: products of integers need"
                " weights=Int8 with block=none and symmetric=true"
            )

    def prepare(self, layer: nnx.Module) -> None:
        """Gives a layer the parameters that it needs for this."""
        layer.activations = self

    @abc.abstractmethod
    def scale(
        self, known: nnx.Param | None, x: Float[Array, "batch seq in"]
    ) -> Float[Array, "..."]:
        """Scale of each token of x, or of all; `known` is what the layer has."""


@config
class DynamicInt8(ActivationCode):
    """Scales of the very inputs, a token each."""

    def scale(
        self, known: nnx.Param | None, x: Float[Array, "batch seq in"]
    ) -> Float[Array, "batch seq 1"]:
        """The largest absolute value of a token over 127."""
        return largest(x.astype(jnp.float32), 2)[..., None] / MOST


@config
class StaticInt8(ActivationCode):
    """A scale for each layer, which calibration finds; what lies beyond is cut off."""

    def prepare(self, layer: nnx.Module) -> None:
        """See `ActivationCode.prepare`; until calibration the scale is 1."""
        layer.activations = self
        layer.input_scale = nnx.Param(jnp.ones((), jnp.float32), out_sharding=P())

    def scale(self, known: nnx.Param | None, x: Float[Array, "batch seq in"]) -> Float[Array, ""]:
        """The layer's."""
        return known[...]


def integer_product(
    x: Float[Array, "batch seq in"],
    scale: Float[Array, "..."],
    form: WeightForm,
    stored: Stored,
    out: P,
) -> Float[Array, "batch seq out"]:
    """x . weight in float32 of inputs and weights in 8 bits.

    Args:
      x: inputs, in any precision.
      scale: of the inputs, for each token or for all.
      form: of the weight.
      stored: what is kept of it, as `WeightForm.gathered` gives it.
      out: spec of the result.
    """
    n = jnp.round(x.astype(jnp.float32) / jnp.where(scale == 0, 1, scale))
    n = jnp.clip(n, -MOST, MOST).astype(jnp.int8)
    batch, seq, inner = x.shape[0], x.shape[1], jax.typeof(stored["codes"]).sharding.spec[1]
    n = jax.reshard(n, P(*jax.typeof(n).sharding.spec[:2], inner))
    few = batch * seq < ROWS and target().platform == "cpu" and out[1] is None
    if few:
        n = jnp.pad(n, ((0, 0), (0, ROWS - seq), (0, 0)))
    sums = jax.lax.dot_general(
        n,
        stored["codes"],
        (((2,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
        out_sharding=out,
    )
    sums = (sums[:, :seq] if few else sums).astype(jnp.float32)
    return sums * scale * form.code.grid(stored, 1).scale[:, 0]
