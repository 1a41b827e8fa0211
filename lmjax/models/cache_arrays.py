"""Arrays of a cache: rows on any devices, the heads of a token in one axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Real, Shaped

from lmjax.models.number_codes import FLOAT8, MOST
from pallas_kernels.decode_attention import quantize
from pallas_kernels.manual_axes import on_each_device


def joined(
    x: Real[Array, "batch new kv_heads head_dim"],
) -> Real[Array, "batch new kv_size"]:
    """The heads of each token one after another."""
    rows, columns, heads, _ = jax.typeof(x).sharding.spec
    return jax.lax.reshape(
        x, (*x.shape[:2], x.shape[2] * x.shape[3]), out_sharding=PartitionSpec(rows, columns, heads)
    )


def apart(
    x: Real[Array, "batch seen kv_size"], like: Float[Array, "batch new kv_heads head_dim"]
) -> Real[Array, "batch seen kv_heads head_dim"]:
    """The heads of each token as those of another array."""
    rows, columns, heads = jax.typeof(x).sharding.spec
    shape = *x.shape[:2], *like.shape[2:]
    return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(rows, columns, heads, None))


def coded(
    x: Float[Array, "batch new kv_heads head_dim"], dtype: jnp.dtype
) -> tuple[Real[Array, "batch new kv_size"], Float[Array, "batch new kv_heads"] | None]:
    """Keys or values as a cache of a dtype keeps them, and the scales of int8."""
    scales = None
    if dtype == jnp.int8:
        x, scales = quantize(x)
    elif dtype == FLOAT8:  # a cast of what is above the largest number gives NaN
        x = jnp.clip(x, -MOST, MOST)
    return joined(x.astype(dtype)), scales


def decoded(
    kept: Real[Array, "batch slots kv_size"],
    scales: Float[Array, "batch kv_heads slots"] | None,
    like: Float[Array, "batch new kv_heads head_dim"],
) -> Float[Array, "batch slots kv_size"]:
    """Keys or values that `coded` kept, in the dtype of new keys or values."""
    if scales is None:
        return kept.astype(like.dtype)
    wide = apart(kept, like).astype(scales.dtype) * jnp.swapaxes(scales, 1, 2)[..., None]
    return joined(wide.astype(like.dtype))


def by_row(function: Callable, specs: Any, *arrays: jax.Array) -> Any:
    """Calls a function that gives each row from that row alone, on each device for its own rows.

    Args:
      function: of the arrays.
      specs: how what it returns lies on the mesh.
      arrays: cut alike along their rows and heads.
    """
    if all(entry is None for spec in jax.tree.leaves(specs) for entry in spec):
        return function(*arrays)
    return on_each_device(function, specs)(*arrays)


def gather(
    rows: Shaped[Array, "batch columns *rest"], index: Int[Array, "batch new"]
) -> Shaped[Array, "batch new *rest"]:
    """Columns of each row; of an index outside the nearest one, whatever it holds."""
    return jax.vmap(lambda row, index: jnp.take(row, index, axis=0, mode="clip"))(rows, index)


def put_rows(
    old: Shaped[Array, "..."], new: Shaped[Array, "..."], slots: Int[Array, "new"], axis: int
) -> Shaped[Array, "..."]:
    """An array with other rows in place of some, which lie on any devices.

    Args:
      old: the array.
      new: the rows; of the axis after theirs they may have only a first part.
      slots: numbers of the rows that are replaced.
      axis: of the rows.
    """
    spec = [*jax.typeof(old).sharding.spec]
    axes, spec[axis] = spec[axis], None
    new = jax.reshard(new, PartitionSpec(*spec))

    def put(old, new, slots):
        rows, part = old.shape[axis], new.shape[axis + 1 : axis + 2]
        if axes is not None:
            slots = slots - rows * jax.lax.axis_index(axes)
        slots = jnp.where((slots >= 0) & (slots < rows), slots, rows)  # else another device's
        index = (*(slice(None),) * axis, slots, *(slice(size) for size in part))
        return old.at[index].set(new, mode="drop", unique_indices=True)

    return by_row(put, jax.typeof(old).sharding.spec, old, new, slots)
