"""The device mesh: six axes that are always there, most of them of size one.

`data` holds whole replicas, `fsdp` shards parameters and optimizer state, and `expert` the experts
of a mixture, each the batch with them; `stage` divides the layers of a pipeline, `context` shards
sequences, `tensor` shards heads and hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType

from lmjax.config import UserError, config

DATA, STAGE = "data", "stage"
AXES = (DATA, "fsdp", "expert", STAGE, "context", "tensor")


@config
class Mesh:
    """Sizes of the device mesh's axes; one of them may be -1: all remaining devices."""

    data: int = 1  # replicas of the whole model
    fsdp: int = -1  # shards of parameters, optimizer state and batch (ZeRO)
    expert: int = 1  # shards of the experts of each layer, and of the batch
    stage: int = 1  # pipeline stages: parts of the layers
    context: int = 1  # shards of each sequence
    tensor: int = 1  # shards of heads, hidden units and vocabulary

    def validate(self) -> None:
        """Raise UserError for sizes that no number of devices could satisfy."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if wrong := [axis for axis, size in sizes.items() if size < 1 and size != -1]:
            raise UserError(
                f"mesh.{wrong[0]}={sizes[wrong[0]]}: a mesh axis is 1 or more, or -1 for the rest"
            )
        if sum(size == -1 for size in sizes.values()) > 1:
            raise UserError(f"mesh: only one axis may be -1 (the rest of the devices), got {sizes}")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The six axis sizes on that many devices; UserError if they do not multiply to it."""
        given = tuple(getattr(self, axis) for axis in AXES)
        named = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, given))
        known = math.prod(size for size in given if size != -1)
        if -1 in given:
            if devices % known:
                raise UserError(
                    f"mesh {named}: the given sizes multiply to {known},"
                    f" which does not divide the {devices} devices here"
                )
            return tuple(devices // known if size == -1 else size for size in given)
        if known != devices:
            raise UserError(
                f"mesh {named} needs {known} devices, and there are {devices};"
                " set one axis to -1 to take the rest, or simulate devices on a CPU with"
                f" JAX_NUM_CPU_DEVICES={known}"
            )
        return given

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices` (all of them by default), every axis Explicit."""
        devices = jax.devices() if devices is None else list(devices)
        sizes, types = self.sizes(len(devices)), (AxisType.Explicit,) * len(AXES)
        if (slices := count_slices(devices)) > 1:
            return jax.sharding.Mesh(over_slices(devices, sizes, slices), AXES, axis_types=types)
        try:
            return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # an axis would have a part of a dimension of a TPU's torus
            laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return jax.sharding.Mesh(laid, AXES, axis_types=types)

    def abstract(self, devices: int) -> AbstractMesh:
        """The same mesh without devices: enough to trace, check shardings and count."""
        return AbstractMesh(self.sizes(devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def count_slices(devices: Sequence[Any]) -> int:
    """Number of TPU slices of the devices: inside of one they are joined by their own network."""
    if devices[0].platform != "tpu":
        return (
            1  # other devices have hosts for slices, and a mesh is laid over these in their order
        )
    return len({getattr(device, "slice_index", 0) for device in devices})


def over_slices(devices: Sequence[Any], sizes: Sequence[int], slices: int) -> np.ndarray:
    """Devices in the shape of a mesh, in which only one axis goes from slice to slice.

    That is `data`, which exchanges least, the gradients once a step; where it has no room for the
    slices it is `stage`, which exchanges activations between neighbours.

    Args:
      devices: of all slices.
      sizes: of the axes.
      slices: number of slices, of equal sizes.

    Raises:
      UserError: neither axis is a multiple of the slices.
    """
    shape = dict(zip(AXES, sizes))
    outer = next((axis for axis in (DATA, STAGE) if shape[axis] % slices == 0), None)
    if outer is None:
        raise UserError(
            f"mesh.data={shape[DATA]}, mesh.stage={shape[STAGE]}: the {len(devices)} devices are "
            f"{slices} slices with a slow network between them, and one of both must be a multiple "
            f"of {slices}: set mesh.data={slices}"
        )
    inside = [size // slices if axis == outer else size for axis, size in shape.items()]
    between = [slices if axis == outer else 1 for axis in shape]
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices)


def axis_size(*axes: str) -> int:
    """Product of the sizes of those axes in the mesh that is set (1 where there is none).

    Inside of a `jax.shard_map` its manual axes count as 1: arrays are those of one device there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in axes if axis not in mesh.manual_axes)
