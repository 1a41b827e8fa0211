"""Weights as integers of 8 or 4 bits, with a zero or without, and as floats of 8 bits."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lmjax.config import config
from lmjax.models.weight_codes import (
    Grid,
    Stored,
    WeightCode,
    blocks,
    from_bytes,
    largest,
    to_bytes,
)

ScaleDtype = Literal["float32", "float16"]
FLOAT8 = jnp.float8_e4m3fn
MOST = float(jnp.finfo(FLOAT8).max)  # 448


@config
class IntegerCode(WeightCode):
    """Base of integers n of b bits: the weight is (n - zero) scale.

    Symmetric: zero is 0, the scale is the largest absolute value of the block over 2^(b-1) - 1.
    Otherwise the block's smallest and largest number, and 0 between them, are 0 and 2^b - 1.
    """

    bits: ClassVar[int]
    plain: ClassVar[bool] = True

    symmetric: bool = True  # zero is 0; false: each block has its own
    scales: ScaleDtype = "float32"  # in which the scales are kept

    @property
    def lowest(self) -> int:
        """The smallest n."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest n."""
        return self.lowest + 2**self.bits - 1

    def fit(self, weight: Float[Array, "*axes"], axis: int) -> Grid:
        """Scale and zero of each block, of its extremes; a scale in 16 bits is rounded up."""
        parts = blocks(weight, axis, self.of(weight.shape[axis]))
        if self.symmetric:
            return Grid(self._kept(largest(parts, axis + 1) / self.highest))
        above, below = (largest(jnp.maximum(a, 0), axis + 1) for a in (parts, -parts))
        scale = self._kept((above + below) / self.highest)
        return Grid(scale, jnp.round(below / jnp.where(scale == 0, 1, scale)))

    def nearest(self, weight: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
        """The nearest n in float32, of scales and zeros that fit the weight's shape."""
        n = jnp.round(weight / jnp.where(grid.scale == 0, 1, grid.scale))
        return jnp.clip(n if grid.zero is None else n + grid.zero, self.lowest, self.highest)

    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """See `WeightCode.encode`."""
        grid = self.fit(weight, axis)
        wide = [p if p is None else self.spread(p, axis, weight.shape[axis]) for p in grid]
        return self.stored(self.nearest(weight, Grid(*wide)), grid, axis)

    def stored(self, n: Float[Array, "*axes"], grid: Grid, axis: int) -> Stored:
        """Arrays that are kept of integers, in float32 here, and the grid of their blocks."""
        kept = {"codes": self.pack(n, axis), "scales": grid.scale.astype(self.scales)}
        return kept if grid.zero is None else kept | {"zeros": grid.zero.astype(jnp.uint8)}

    def pack(self, n: Float[Array, "*axes"], axis: int) -> Shaped[Array, "*codes"]:
        """The integers as they are kept."""
        return n.astype(jnp.int8 if self.symmetric else jnp.uint8)

    def raw(self, codes: Shaped[Array, "*codes"], axis: int) -> Float[Array, "*axes"]:
        """See `WeightCode.raw`."""
        return codes.astype(jnp.float32)

    def grid(self, stored: Stored, axis: int) -> Grid:
        """See `WeightCode.grid`."""
        zeros = stored.get("zeros")
        zeros = None if zeros is None else zeros.astype(jnp.float32)
        return Grid(stored["scales"].astype(jnp.float32), zeros)

    def _kept(self, scale: Float[Array, "*blocks"]) -> Float[Array, "*blocks"]:
        """The scale as it is kept; in 16 bits no smaller, so that no number lies beyond the grid.

        What lies beyond their range is NaN or infinite, and so then is the block.
        """
        if self.scales == "float32":
            return scale
        return (scale * (1 + 2.0**-10)).astype(self.scales).astype(jnp.float32)


@config
class Int8(IntegerCode):
    """Integers of 8 bits."""

    bits: ClassVar[int] = 8


@config
class Int4(IntegerCode):
    """Integers of 4 bits, two in a byte."""

    bits: ClassVar[int] = 4
    packed: ClassVar[int] = 2

    def pack(self, n: Float[Array, "*axes"], axis: int) -> Shaped[Array, "*codes"]:
        """See `IntegerCode.pack`; counted from the smallest."""
        return to_bytes((n - self.lowest).astype(jnp.uint8), axis)

    def raw(self, codes: Shaped[Array, "*codes"], axis: int) -> Float[Array, "*axes"]:
        """See `WeightCode.raw`."""
        n = from_bytes(codes, axis, 2 * codes.shape[axis])
        return n.astype(jnp.float32) + self.lowest

    def in_slots(self, codes: Shaped[Array, "*codes"]) -> tuple[Float[Array, "*codes"], ...]:
        """See `WeightCode.in_slots`; without bringing neighbours together first."""
        return tuple(n.astype(jnp.float32) + self.lowest for n in (codes & 15, codes >> 4))


@config
class Float8(WeightCode):
    """Floats of 8 bits, e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), over a block's scale.

    By the scale the largest absolute value of the block is 448, the largest of the format.
    """

    block: int | None = None  # neighbouring numbers that share a scale; none: all along the axis

    def encode(self, weight: Float[Array, "*axes"], axis: int) -> Stored:
        """See `WeightCode.encode`."""
        size = weight.shape[axis]
        scales = largest(blocks(weight, axis, self.of(size)), axis + 1) / MOST
        wide = self.spread(scales, axis, size)
        # A cast of what is above the largest number gives NaN.
        codes = jnp.clip(weight / jnp.where(wide == 0, 1, wide), -MOST, MOST).astype(FLOAT8)
        return {"codes": codes, "scales": scales}

    def raw(self, codes: Shaped[Array, "*codes"], axis: int) -> Float[Array, "*axes"]:
        """See `WeightCode.raw`."""
        return codes.astype(jnp.float32)

    def grid(self, stored: Stored, axis: int) -> Grid:
        """See `WeightCode.grid`."""
        return Grid(stored["scales"])
