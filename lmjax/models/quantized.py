"""Frozen weights in 4 or 8 bits, each block of them with a scale (Dettmers et al. 2023)."""

from __future__ import annotations

import abc
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int8, Num, UInt8

from lmjax.config import UserError, config
from lmjax.parallel import Layout, axis_size

SECOND_BLOCK = 256  # scales that share one of their own (section 3, "Double Quantization")
Stored = dict[str, jax.Array]


@config
class WeightCode(abc.ABC):
    """Base of the ways to keep frozen weights: small integers, and a scale for each block of them.

    Blocks run along one axis of a weight; the last one may be shorter. The scale is the largest
    absolute value of the block.
    """

    block: int = 64  # neighbouring numbers that share a scale

    def validate(self) -> None:
        """Raises UserError for a block of no numbers."""
        if self.block < 2:
            raise UserError(f"lora.base.block={self.block}: must be 2 or more")

    @abc.abstractmethod
    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """Arrays that are kept of a weight; traceable.

        Args:
          weight: whole on every device along `axis`.
          axis: that blocks run along, from 0.
        """

    @abc.abstractmethod
    def decode(self, stored: Stored, axis: int, size: int) -> Float[Array, "*axes"]:
        """The weight in float32 of the arrays of `encode`, with `size` numbers along `axis`."""


@config
class ScaledInt8(WeightCode):
    """8-bit integers n for scale n / 127, the nearest of them."""

    block: int = 256  # neighbouring numbers that share a scale

    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """See `WeightCode.encode`."""
        codes, scales = to_int8(weight, axis, self.block)
        return {"codes": codes, "scales": scales}

    def decode(self, stored: Stored, axis: int, size: int) -> Float[Array, "*axes"]:
        """See `WeightCode.decode`."""
        return from_int8(stored["codes"], stored["scales"], axis, self.block)


@config
class NF4(WeightCode):
    """NormalFloat of 4 bits (arXiv:2305.14314, section 3): 16 quantiles of a normal distribution.

    Two codes are a byte. With double quantization a scale is 8 bits too: its difference from the
    mean scale of the weight, which are integers here where the paper has floats of 8 bits.
    """

    double: bool = True  # scales are kept in 8 bits

    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """See `WeightCode.encode`; codes are those nearest to the weight over the kept scale."""
        scales = largest(blocks(weight, axis, self.block), axis + 1)
        stored = {"scales": scales}
        if self.double:
            mean = jnp.mean(scales)
            differences, of_blocks = to_int8(scales - mean, axis, SECOND_BLOCK)
            stored = {"scales": differences, "scale_scales": of_blocks, "scale_mean": mean}
            scales = self._scales(stored, axis)
        scales = spread(scales, axis, self.block, weight.shape[axis])
        fractions = weight / jnp.where(scales == 0, 1, scales)
        middles = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
        codes = sum((fractions > middle).astype(jnp.uint8) for middle in middles)
        return stored | {"codes": to_bytes(codes, axis)}

    def decode(self, stored: Stored, axis: int, size: int) -> Float[Array, "*axes"]:
        """See `WeightCode.decode`."""
        codes = from_bytes(stored["codes"], axis, size)
        spec = jax.typeof(codes).sharding.spec
        values = jnp.asarray(NF4_VALUES).at[codes].get(out_sharding=spec)
        return values * spread(self._scales(stored, axis), axis, self.block, size)

    def _scales(self, stored: Stored, axis: int) -> Float[Array, "*blocks"]:
        if not self.double:
            return stored["scales"]
        differences = from_int8(stored["scales"], stored["scale_scales"], axis, SECOND_BLOCK)
        scales = differences + stored["scale_mean"]
        return jnp.where(scales < 0, 0, scales)


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


class QuantizedWeight(nnx.Module):
    """Arrays that are kept of a dense layer's weight, and the weight made of them.

    Blocks run along the axis `embed`, which no device holds a part of where a weight is used. The
    arrays are cut over the mesh as the weight is, where their sizes divide.
    """

    def __init__(
        self,
        weight: Float[Array, "*axes"],
        axes: tuple[tuple[str | None, int], ...],
        code: WeightCode,
        layout: Layout,
    ):
        names = tuple(name for name, _ in axes)
        self.names, self.code, self.layout = names, code, layout
        self.axis = names.index("embed") if "embed" in names else len(names) - 1
        self.size = weight.shape[self.axis]
        stored = encoded(weight, code, self.axis)
        for name, array in stored.items():
            setattr(self, name, nnx.Param(array, out_sharding=self._spec(array.shape)))
        self.parts = tuple(stored)

    def stored(self) -> Stored:
        """The arrays by their names."""
        return {name: getattr(self, name)[...] for name in self.parts}

    def read(self, stored: Stored) -> Float[Array, "*axes"]:
        """The weight in float32, whole along `embed`, of these arrays."""
        gathered = self.layout.gathered(*self.names)
        whole = {
            name: jax.reshard(array, self._spec(array.shape, gathered))
            for name, array in stored.items()
        }
        return self.code.decode(whole, self.axis, self.size)

    def _spec(
        self, shape: tuple[int, ...], names: tuple[str | None, ...] | None = None
    ) -> PartitionSpec:
        """Spec of an array, with `names` in place of those of the weight's axes."""
        names = self.names if names is None else names
        return divided(shape, self.layout.spec(*names))


def encoded(weight: Float[Array, "*axes"], code: WeightCode, axis: int) -> Stored:
    """Arrays that are kept of a weight, cut over the mesh as that is; traceable."""
    spec = jax.typeof(weight).sharding.spec
    whole = jax.reshard(weight, PartitionSpec(*(None,) * weight.ndim))
    stored = code.encode(whole, axis).items()
    return {name: jax.reshard(a, divided(a.shape, spec)) for name, a in stored}


def divided(shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The spec for what is kept of a weight that has this spec: less what does not divide.

    A single number of the whole weight has no axes.
    """
    entries = [
        None
        if entry is None or size % axis_size(*((entry,) if isinstance(entry, str) else entry))
        else entry
        for size, entry in zip(shape, spec)
    ]
    return PartitionSpec(*entries)


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
    wide = jnp.stack([scales] * block, axis=axis + 1)
    wide = _reshape(wide, (*shape[:axis], shape[axis] * block, *shape[axis + 1 :]), axis, -1)
    return jax.lax.slice_in_dim(wide, 0, size, axis=axis)


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
    return jax.lax.slice_in_dim(whole, 0, size, axis=axis)


def _reshape(array: jax.Array, shape: tuple[int, ...], axis: int, added: int) -> jax.Array:
    """Reshapes by an axis more (1) or less (-1) after `axis`; both are whole on every device."""
    spec = list(jax.typeof(array).sharding.spec)
    rest = [None, *spec[axis + 1 :]] if added > 0 else spec[axis + 2 :]
    return array.reshape(shape, out_sharding=PartitionSpec(*spec[: axis + 1], *rest))
