"""Masks of answers, and sums under them.

Every array of the package has a mask that says which entries are real. The others are replaced by
0 before anything is computed with them, so that neither 1e6 nor NaN there changes a value or a
gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from lmjax.config import UserError


def keep(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The values where the mask is true, and 0 elsewhere, whatever is there."""
    return jnp.where(mask, values, 0)


def masked_mean(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean over the real entries of all rows; 0 where there are none."""
    count = jnp.sum(mask.astype(values.dtype))
    return jnp.sum(keep(values, mask)) / jnp.where(count > 0, count, 1)


def last_real(mask: Bool[Array, "rows seq"]) -> Bool[Array, "rows seq"]:
    """Marks the last true entry of each row; nothing in a row without one."""
    mask = whole_rows(mask)
    index = jnp.arange(mask.shape[1])
    last = jnp.argmax(jnp.where(mask, index, -1), axis=1)
    return mask & (index == last[:, None])


def spread(values: Float[Array, "rows"], mask: Bool[Array, "rows seq"]) -> Float[Array, "rows seq"]:
    """Each row's value at all its real positions, 0 at the others."""
    return jnp.where(mask, values[:, None], 0)


def require_shape(name: str, array: Shaped[Array, "..."], shape: tuple[int, ...]) -> None:
    """Raises UserError for an array of another shape, which could be broadcast unnoticed."""
    if array.shape != shape:
        raise UserError(f"{name} has the shape {array.shape}; it must be {shape}")


def whole_rows(array: Shaped[Array, "rows seq"]) -> Shaped[Array, "rows seq"]:
    """The array with each row on one device, as scans along rows need it."""
    rows, seq = (*jax.typeof(array).sharding.spec, None, None)[:2]
    return array if seq is None else jax.reshard(array, PartitionSpec(rows, None))
