"""Random numbers that are the same however a batch is divided."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from lmjax.parallel.mesh import DATA


def draw_rows(
    draw: Callable[..., jax.Array], shape: tuple[int, ...], spec: PartitionSpec
) -> jax.Array:
    """Draws numbers for the rows of a batch, along their first axis.

    Each device draws its own part of one array of all rows. So does each shard over `data` where
    that axis is manual and a shape is that of a shard's rows.

    Args:
      draw: (shape, out_sharding=spec) -> numbers, by their index in the flat array.
      shape: rows and what each has.
      spec: of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.manual_axes:
        return draw(shape, out_sharding=spec)
    whole = draw((mesh.shape[DATA], *shape), out_sharding=PartitionSpec(None, *spec))
    return jax.lax.dynamic_index_in_dim(whole, jax.lax.axis_index(DATA), keepdims=False)
