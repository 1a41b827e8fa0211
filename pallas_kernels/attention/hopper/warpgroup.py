"""Operations of a warpgroup on a tile: on the chip by Mosaic GPU, else the same in plain arrays.

Pallas' GPU interpreter runs copies, barriers and arithmetic, but in jax 0.10 no matrix product that
accumulates or has an operand in registers, and no layouts. So a kernel asks a `Warpgroup` for
these, and the one that is simulated computes them from the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.hopper.compat import load, transposed
from pallas_kernels.pallas import pl, plgpu

ROWS = 64  # of an operand of the tensor cores, which is a warpgroup's part of a tile
NOTHING = lambda: None  # noqa: E731


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """Operations of one warpgroup on arrays [rows, columns] that its registers hold.

    Attributes:
        simulated: whether the interpreter runs it.
    """

    simulated: bool

    def product(
        self, pairs: list[tuple[Any, Any]], shape: tuple[int, int], meanwhile: Callable = NOTHING
    ) -> jax.Array:
        """Sum of a b^T over pairs of references, float32; `meanwhile` runs before it is ready."""
        if self.simulated:
            meanwhile()
            return sum(_dot(a[...], b[...].T) for a, b in pairs)

        def scope(total):
            for a, b in pairs:
                plgpu.wgmma(total, a, transposed(b))
            meanwhile()
            return total[...]

        return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))

    def accumulate(self, total, a, b, meanwhile: Callable = NOTHING) -> jax.Array:
        """`total` + a b of an array a of 16 bits and a reference b."""
        if self.simulated:
            meanwhile()
            return total + _dot(a, b[...])

        def add(reference):
            plgpu.wgmma(reference, a, b)
            meanwhile()

        return pl.run_state(add)(plgpu.ACC.init(total))

    def full(self, shape: tuple[int, int], value, dtype=jnp.float32) -> jax.Array:
        """A tile of one value."""
        return self._laid_out(jnp.full(shape, value, dtype), plgpu.Layout.WGMMA)

    def vector(self, size: int, value, axis: int) -> jax.Array:
        """A float32 vector of one value along an axis of tiles."""
        return self._laid_out(jnp.full((size,), value, jnp.float32), _along(axis))

    def load(self, reference, axis: int) -> jax.Array:
        """A vector in global or shared memory, along an axis of tiles."""
        if self.simulated:
            return reference[...]
        return load(reference, _along(axis))

    def load_tile(self, reference) -> jax.Array:
        """A tile in global memory."""
        if self.simulated:
            return reference[...]
        return load(reference, plgpu.Layout.WGMMA)

    def indices(self, size: int, axis: int) -> jax.Array:
        """The index of each element of a vector along an axis of tiles, int32."""
        return self._laid_out(lax.iota(jnp.int32, size), _along(axis))

    def opaque(self, index) -> jax.Array:
        """An index of which the compiler knows nothing.

        Of operands at a known address it would compute all descriptors before a loop, and keep them
        in registers that there are not.
        """
        index = jnp.asarray(index, jnp.int32)
        return index if self.simulated else lax.optimization_barrier(index)

    def register_limit(self, count: int, action: str) -> None:
        """Gives registers to this warpgroup, or takes them."""
        if not self.simulated:
            plgpu.set_max_registers(count, action=action)

    def _laid_out(self, array, layout) -> jax.Array:
        return array if self.simulated else plgpu.layout_cast(array, layout)


def spread(vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector along an axis of a tile, repeated along the other."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def _along(axis: int):
    return plgpu.Layout.WGMMA.reduce(1 - axis)


def _dot(a, b) -> jax.Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))
