"""Ways to keep weights in 4 or 8 bits, each block of them with a scale (Dettmers et al. 2023).

Every one gives a weight as (raw - zero) scale: `raw` is a small number that a code stands for,
`scale` and `zero` are those of its block.
"""

from __future__ import annotations

import abc
import statistics
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int8, Num, Shaped, UInt8

from lmjax.config import UserError, config

SECOND_BLOCK = 256  # scales that share one of their own (section 3, "Double Quantization")
Stored = dict[str, jax.Array]


class Grid(NamedTuple):
    """Scale of each block of a weight, and its zero among the raw numbers; None: it is 0."""

    scale: Float[Array, "*blocks"]
    zero: Float[Array, "*blocks"] | None = None


@config
class WeightCode(abc.ABC):
    """Base of the ways to keep weights: small numbers, and a scale for each block of them.

    Blocks run along one axis of a weight; the last one may be shorter.
    """

    packed: ClassVar[int] = 1  # codes in a byte
    plain: ClassVar[bool] = False  # whether arithmetic alone, and no table, makes numbers of codes

    block: int | None = 64  # neighbouring numbers that share a scale; none: all along the axis

    def validate(self) -> None:
        """Raises UserError for a block of no numbers."""
        if self.block is not None and self.block < 2:
            raise UserError(f"block={self.block}: must be 2 or more")

    @abc.abstractmethod
    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """Arrays that are kept of a weight, "codes" among them; traceable.

        Args:
          weight: whole on every device along `axis`.
          axis: that blocks run along, from 0.
        """

    @abc.abstractmethod
    def raw(self, codes: Shaped[Array, "*codes"], axis: int) -> Float[Array, "*axes"]:
        """Numbers in float32 that codes stand for, before scale and zero; `packed` a code."""

    def in_slots(self, codes: Shaped[Array, "*codes"]) -> tuple[Float[Array, "*codes"], ...]:
        """Numbers, as `raw`, of all codes' first slots, their second, ...; of a `plain` code."""
        return (self.raw(codes, 0),)

    @abc.abstractmethod
    def grid(self, stored: Stored, axis: int) -> Grid:
        """Scales and zeros of the blocks, in float32."""

    def decode(self, stored: Stored, axis: int, size: int) -> Float[Array, "*axes"]:
        """The weight in float32 of the arrays of `encode`, with `size` numbers along `axis`."""
        raw = self.raw(stored["codes"], axis)
        if raw.shape[axis] != size:
            raw = jax.lax.slice_in_dim(raw, 0, size, axis=axis)
        spec = jax.typeof(raw).sharding.spec
        wide = [
            part if part is None else jax.reshard(self.spread(part, axis, size), spec)
            for part in self.grid(stored, axis)
        ]
        return (raw if wide[1] is None else raw - wide[1]) * wide[0]

    def of(self, size: int) -> int:
        """Numbers of a block along an axis of `size`."""
        return size if self.block is None else self.block

    def spread(self, part: Float[Array, "*blocks"], axis: int, size: int) -> Float[Array, "*axes"]:
        """Each block's number for each of its weights, of which there are `size` along `axis`."""
        return spread(part, axis, self.of(size), size)


@config
class ScaledInt8(WeightCode):
    """8-bit integers n for scale n / 127, the nearest of them."""

    plain: ClassVar[bool] = True

    block: int | None = 256  # neighbouring numbers that share a scale; none: all along the axis

    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """See `WeightCode.encode`; the scale is the largest absolute value of the block."""
        codes, scales = to_int8(weight, axis, self.of(weight.shape[axis]))
        return {"codes": codes, "scales": scales}

    def raw(self, codes: Int8[Array, "*axes"], axis: int) -> Float[Array, "*axes"]:
        """See `WeightCode.raw`."""
        return codes.astype(jnp.float32)

    def grid(self, stored: Stored, axis: int) -> Grid:
        """See `WeightCode.grid`."""
        return Grid(stored["scales"] / 127)


@config
class NF4(WeightCode):
    """NormalFloat of 4 bits (arXiv:2305.14314, section 3): 16 quantiles of a normal distribution.

    Two codes are a byte. The scale is the largest absolute value of the block. With double
    quantization it is 8 bits too: its difference from the mean scale of the weight, which are
    integers here where the paper has floats of 8 bits.
    """

    packed: ClassVar[int] = 2

    double: bool = True  # scales are kept in 8 bits

    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """See `WeightCode.encode`; codes are those nearest to the weight over the kept scale."""
        size = weight.shape[axis]
        scales = largest(blocks(weight, axis, self.of(size)), axis + 1)
        stored = {"scales": scales}
        if self.double:
            mean = jnp.mean(scales)
            differences, of_blocks = to_int8(scales - mean, axis, SECOND_BLOCK)
            stored = {"scales": differences, "scale_scales": of_blocks, "scale_mean": mean}
            scales = self.grid(stored, axis).scale
        scales = self.spread(scales, axis, size)
        fractions = weight / jnp.where(scales == 0, 1, scales)
        middles = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
        codes = sum((fractions > middle).astype(jnp.uint8) for middle in middles)
        return stored | {"codes": to_bytes(codes, axis)}

    def raw(self, codes: UInt8[Array, "*halved"], axis: int) -> Float[Array, "*axes"]:
        """See `WeightCode.raw`."""
        codes = from_bytes(codes, axis, 2 * codes.shape[axis])
        spec = jax.typeof(codes).sharding.spec
        return jnp.asarray(NF4_VALUES).at[codes].get(out_sharding=spec)

    def grid(self, stored: Stored, axis: int) -> Grid:
        """See `WeightCode.grid`."""
        if not self.double:
            return Grid(stored["scales"])
        differences = from_int8(stored["scales"], stored["scale_scales"], axis, SECOND_BLOCK)
        scales = differences + stored["scale_mean"]
        return Grid(jnp.where(scales < 0, 0, scales))


def normal_quantiles() -> Float[np.ndarray, "values"]:
    """The values of NF4 (Dettmers et al. 2023, section 3, appendix E), from -1 to 1, with 0.

    Quantiles of N(0, 1) at evenly spaced probabilities, 7 below zero and 8 above, over the largest.
    The outermost probability is 1 - (1/30 + 1/32) / 2, the mean of those for 15 and for 16 values.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = statistics.NormalDist().inv_cdf
    sides = [[quantile(p) for p in np.linspace(0.5, outermost, count + 1)[1:]] for count in (7, 8)]
    values = np.array([*(-v for v in reversed(sides[0])), 0.0, *sides[1]])
    return (values / quantile(outermost)).astype(np.float32)


NF4_VALUES = normal_quantiles()


# ---- arrays and their blocks -------------------------------------------------------------------


def blocks(array: Num[Array, "*axes"], axis: int, block: int) -> Num[Array, "*blocked"]:
    """The array with `axis` cut into blocks, filled up with zeros: [..., blocks, block, ...]."""
    shape = array.shape
    count = -(-shape[axis] // block)
    filling = [(0, 0)] * array.ndim
    filling[axis] = (0, count * block - shape[axis])
    if filling[axis][1]:
        array = jnp.pad(array, filling)
    return _reshape(array, (*shape[:axis], count, block, *shape[axis + 1 :]), axis, 1)


def largest(blocked: Float[Array, "*blocked"], axis: int) -> Float[Array, "*blocks"]:
    """Largest absolute value along an axis; NaN where a value is not finite."""
    absolute = jnp.abs(blocked)
    # The maximum alone may pass over NaN.
    finite = jnp.isfinite(jnp.sum(absolute, axis=axis))
    return jnp.where(finite, jnp.max(absolute, axis=axis), jnp.nan)


def spread(
    scales: Float[Array, "*blocks"], axis: int, block: int, size: int
) -> Float[Array, "*axes"]:
    """Each block's scale for each of its numbers, of which there are `size` along `axis`."""
    shape = scales.shape
    wide = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), _with(shape, axis, block))
    wide = _reshape(wide, (*shape[:axis], shape[axis] * block, *shape[axis + 1 :]), axis, -1)
    return wide if wide.shape[axis] == size else jax.lax.slice_in_dim(wide, 0, size, axis=axis)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """The shape with an axis of `size` behind `axis`."""
    return (*shape[: axis + 1], size, *shape[axis + 1 :])


def to_int8(
    array: Float[Array, "*axes"], axis: int, block: int
) -> tuple[Int8[Array, "*axes"], Float[Array, "*blocks"]]:
    """Integers from -127 to 127, and the largest absolute value of each block."""
    scales = largest(blocks(array, axis, block), axis + 1)
    wide = spread(scales, axis, block, array.shape[axis])
    return jnp.round(array / jnp.where(wide == 0, 1, wide) * 127).astype(jnp.int8), scales


def from_int8(
    codes: Int8[Array, "*axes"], scales: Float[Array, "*blocks"], axis: int, block: int
) -> Float[Array, "*axes"]:
    """Numbers of what `to_int8` gives."""
    return codes.astype(jnp.float32) * (spread(scales, axis, block, codes.shape[axis]) / 127)


def to_bytes(codes: UInt8[Array, "*axes"], axis: int) -> UInt8[Array, "*halved"]:
    """Numbers below 16, two neighbours along an axis in a byte, the first in its low bits."""
    pairs = blocks(codes, axis, 2)
    low, high = (jax.lax.index_in_dim(pairs, n, axis + 1, keepdims=False) for n in (0, 1))
    return low | (high << 4)


def from_bytes(packed: UInt8[Array, "*halved"], axis: int, size: int) -> UInt8[Array, "*axes"]:
    """The numbers of `to_bytes`, `size` of them along the axis."""
    shape = packed.shape
    pairs = jnp.stack([packed & 15, packed >> 4], axis=axis + 1)
    whole = _reshape(pairs, (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]), axis, -1)
    return whole if whole.shape[axis] == size else jax.lax.slice_in_dim(whole, 0, size, axis=axis)


def _reshape(array: jax.Array, shape: tuple[int, ...], axis: int, added: int) -> jax.Array:
    """Reshapes by an axis more (1) or less (-1) after `axis`; both are whole on every device."""
    spec = list(jax.typeof(array).sharding.spec)
    rest = [None, *spec[axis + 1 :]] if added > 0 else spec[axis + 2 :]
    return array.reshape(shape, out_sharding=PartitionSpec(*spec[: axis + 1], *rest))
