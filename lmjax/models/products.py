"""Products of dense layers whose operands have 8 bits, or whose gradients are summed in float32.

y = x w is computed by a function with a backward of its own:

- `fp8=True`: x and w are rounded to float8 e4m3 (4 bits of exponent, 3 of mantissa), the gradient
  of y to e5m2, which reaches further (Micikevicius et al. 2022, arXiv:2209.05433). Each array has
  one scale, by which its largest number becomes the largest of the format: that of this very array
  (current scaling), so that there is no history to keep. Sums are in float32.
- `gradient_sum="float32"`: the gradient of w leaves the product in float32, and is summed over the
  devices and kept in it. By default both have the dtype of the computation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lmjax.config import config

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


@config
class Products:
    """Precision of the products of dense layers, beside the dtype of the computation."""

    fp8: bool = False  # operands of 8 bits, for dtype=bfloat16 or float16
    # in which the gradients of weights are summed over devices; computation: its dtype
    gradient_sum: Literal["computation", "float32"] = "computation"


@dataclasses.dataclass(frozen=True)
class Product:
    """x . weight over the last axes of x and the first of the weight.

    Attributes:
      inputs: number of axes that are summed over.
      spec: of the result.
      fp8: whether operands are rounded to 8 bits.
      gather: stored weight -> the one that is multiplied with, in the dtype of x; differentiable.
    """

    inputs: int
    spec: P
    fp8: bool
    gather: Callable[[jax.Array], jax.Array]

    def __call__(
        self, x: Float[Array, "batch seq *inputs"], stored: jax.Array
    ) -> Float[Array, "batch seq *outputs"]:
        """The product; its backward gathers the weight again."""
        return _product(self, x, stored)

    def forward(self, x: jax.Array, stored: jax.Array) -> jax.Array:
        """See `__call__`."""
        weight, over = self.gather(stored), tuple(range(2, 2 + self.inputs))
        return self.dot(x, weight, (over, tuple(range(self.inputs))), self.spec, FORWARD)

    def backward(
        self, x: jax.Array, stored: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Gradients by x, in its dtype, and by the stored weight, in that weight's dtype."""
        weight = self.gather(stored)
        outputs = weight.ndim - self.inputs
        over = tuple(range(2, 2 + outputs)), tuple(range(self.inputs, weight.ndim))
        d_x = self.dot(gradient, weight, over, jax.typeof(x).sharding.spec, BACKWARD)
        # Both sides are cut along the batch. Asked for as it is stored, the result is summed over
        # the devices that share a weight first, and of replicas each shard alone.
        spec = jax.typeof(stored).sharding.spec
        d_weight = self.dot(x, gradient, ((0, 1), (0, 1)), spec, FORWARD, jnp.float32)
        return d_x, d_weight.astype(stored.dtype)

    def dot(
        self,
        a: jax.Array,
        b: jax.Array,
        over: tuple[tuple[int, ...], tuple[int, ...]],
        spec: P,
        format_a: type,
        dtype: type | None = None,
    ) -> jax.Array:
        """a . b in float32, rounded to `dtype`, or else to that of a."""
        out, scale = a.dtype if dtype is None else dtype, None
        if self.fp8:
            format_b = BACKWARD if dtype == jnp.float32 else FORWARD
            (a, scale_a), (b, scale_b) = in_8_bits(a, format_a), in_8_bits(b, format_b)
            scale = scale_a * scale_b
        result = jax.lax.dot_general(
            a, b, (over, ((), ())), preferred_element_type=jnp.float32, out_sharding=spec
        )
        return (result if scale is None else result * scale).astype(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(product: Product, x: jax.Array, stored: jax.Array) -> jax.Array:
    return product.forward(x, stored)


def _forward(product: Product, x: jax.Array, stored: jax.Array) -> tuple[jax.Array, tuple]:
    return product.forward(x, stored), (x, stored)


def _backward(product: Product, kept: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return product.backward(*kept, gradient)


_product.defvjp(_forward, _backward)


def in_8_bits(a: Float[Array, "..."], dtype: type) -> tuple[jax.Array, Float[Array, ""]]:
    """a over a scale in 8 bits, and the scale, a float32 power of two.

    By a power of two no further bit is lost. The largest number may be half of the format's
    largest; of normal numbers the relative error is at most 2^-4 in e4m3 and 2^-3 in e5m2.
    """
    most = float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(a)).astype(jnp.float32)
    _, exponent = jnp.frexp(largest / most)  # largest / most < 2^exponent
    usable = (largest > 0) & jnp.isfinite(largest)
    scale = jnp.where(usable, jnp.ldexp(jnp.float32(1), exponent), 1.0)
    # Casts give NaN above the largest number, and never saturate: it is below it by the scale.
    return (a.astype(jnp.float32) / scale).astype(dtype), scale


def bound_of_error(a: Float[Array, "..."], dtype: type) -> Float[Array, "..."]:
    """Largest error of each number in `in_8_bits`: half a step of the format.

    A part in 2^(bits of mantissa + 1) of normal numbers, and of subnormal ones half the smallest.
    """
    _, scale = in_8_bits(a, dtype)
    info = jnp.finfo(dtype)
    smallest = float(info.smallest_subnormal) * scale / 2
    return jnp.maximum(jnp.abs(a).astype(jnp.float32) * 2.0 ** -(info.nmant + 1), smallest)
