"""Weights of dense layers in few bits: how they are kept on a mesh, and made whole again."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lmjax.models.weight_codes import Stored, WeightCode
from lmjax.parallel import Layout, axis_size

Axes = tuple[tuple[str | None, int], ...]


@dataclasses.dataclass(frozen=True)
class WeightForm:
    """Form in which a weight of few bits is kept: that of a matrix, or of a stack of them.

    It is [*stack, outputs, inputs] with one axis of inputs, along which blocks run, and one of
    outputs, if there are any: neighbours that share a scale lie beside each other in memory. What
    is kept is cut over the mesh as the weight is, where sizes divide.

    Attributes:
      inputs: axes that a product sums over.
      outputs: the other axes; () for a table of rows.
      code: how numbers are kept.
      layout: how axes are cut over the mesh.
      stack: axes before these: of experts, or of rows.
    """

    inputs: Axes
    outputs: Axes
    code: WeightCode
    layout: Layout
    stack: Axes = ()

    @property
    def axis(self) -> int:
        """The axis of the matrix that blocks run along, its last."""
        return len(self.stack) + bool(self.outputs)

    @property
    def size(self) -> int:
        """Numbers along that axis."""
        return math.prod(size for _, size in self.inputs)

    @property
    def names(self) -> tuple[str | None, ...]:
        """Logical axes of the weight."""
        return tuple(name for name, _ in self.stack + self.inputs + self.outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(size for _, size in self.stack + self.inputs + self.outputs)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the matrix, or of the stack of them."""
        outputs = (math.prod(size for _, size in self.outputs),) if self.outputs else ()
        return (*(size for _, size in self.stack), *outputs, self.size)

    def encode(self, weight: Float[Array, "*axes"]) -> Stored:
        """Arrays that are kept of a weight, cut over the mesh; traceable."""
        whole = jax.reshard(weight, PartitionSpec(*(None,) * weight.ndim))
        whole = whole.reshape(*(size for _, size in self.stack), self.size, -1)
        matrix = self.turned({"": whole})[""].reshape(self.matrix_shape)
        return self.cut(self.code.encode(matrix, self.axis))

    def turned(self, stored: Stored) -> Stored:
        """Arrays of [inputs, outputs] as they are kept, or the other way round."""
        return {n: jnp.swapaxes(a, -1, -2) if a.ndim > 1 else a for n, a in stored.items()}

    def cut(self, stored: Stored) -> Stored:
        """The arrays that are kept, cut over the mesh as they are at rest."""
        return {name: jax.reshard(a, self.spec(a.shape)) for name, a in stored.items()}

    def gathered(self, stored: Stored, whole: bool = True) -> Stored:
        """The arrays that are kept as they are decoded: codes alone may be cut along `axis`.

        Args:
          stored: the arrays.
          whole: along `embed`; false: as the weight is at rest.
        """
        names = self.layout.gathered(*self.names) if whole else self.names
        # A last byte without a second number: no device can have a part of the codes.
        odd = stored["codes"].shape[self.axis] * self.code.packed != self.size
        usable = {}
        for name, array in stored.items():
            spec = list(self.spec(array.shape, names))
            if self.axis < len(spec) and (odd or name != "codes"):
                spec[self.axis] = None
            usable[name] = jax.reshard(array, PartitionSpec(*spec))
        return usable

    def read(self, stored: Stored, whole: bool = True) -> Float[Array, "*axes"]:
        """The weight in float32 of what is kept; `whole` as in `gathered`."""
        names = self.layout.gathered(*self.names) if whole else self.names
        matrix = self.code.decode(self.gathered(stored, whole), self.axis, self.size)
        matrix = jax.reshard(matrix, self.spec(self.matrix_shape, names))
        if self.outputs:
            matrix = jnp.swapaxes(matrix, -1, -2)
        return matrix.reshape(self.shape, out_sharding=self.layout.spec(*names, shape=self.shape))

    def spec(
        self, shape: tuple[int, ...], names: tuple[str | None, ...] | None = None
    ) -> PartitionSpec:
        """Spec of an array of the matrix, less what does not divide.

        Args:
          shape: of the array; a single number of the whole weight has no axes.
          names: in place of those of the weight's axes.
        """
        every = self.layout.spec(*(self.names if names is None else names), shape=self.shape)
        # Of several axes that are one, the first is the one that is cut.
        stack = len(self.stack)
        starts = [*range(stack), *[stack + len(self.inputs)] * bool(self.outputs), stack]
        return PartitionSpec(*(_dividing(every[n], size) for n, size in zip(starts, shape)))


class QuantizedWeight(nnx.Module):
    """Arrays that are kept of a weight, and their form."""

    def __init__(self, weight: Float[Array, "*axes"], form: WeightForm):
        self.form = form
        stored = form.encode(weight)
        for name, array in stored.items():
            setattr(self, name, nnx.Param(array, out_sharding=form.spec(array.shape)))
        self.parts = tuple(stored)

    def stored(self) -> Stored:
        """The arrays by their names."""
        return {name: getattr(self, name)[...] for name in self.parts}


def _dividing(entry: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """Mesh axes of an entry of a spec, None where the size does not divide by them."""
    if entry is None or size % axis_size(*((entry,) if isinstance(entry, str) else entry)):
        return None
    return entry
