"""Biases of scores that depend on the head and on the distance from query to key alone."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.pytree import pytree


class DistanceBias(abc.ABC):
    """Base: a bias made from few parameters, so that no array over pairs is needed.

    Its distance is the index of the key less that of the query, counted in keys from
    `Mask.offset`. Every array of it has the heads as its first axis.
    """

    @property
    @abc.abstractmethod
    def num_heads(self) -> int:
        """Number of query heads."""

    @abc.abstractmethod
    def at(self, distance: Int[Array, "*shape"]) -> Float[Array, "heads *shape"]:
        """Bias of each head at these distances, float32."""

    def tile(
        self, rows: Int[Array, "query"], keys: Int[Array, "key"]
    ) -> Float[Array, "1 heads query key"]:
        """Bias of queries and keys with these indices."""
        return self.at(keys[None, :] - rows[:, None])[None]

    def between(
        self, queries: Int[Array, "batch query"], keys: Int[Array, "key"]
    ) -> Float[Array, "batch heads query key"]:
        """Bias of queries whose indices differ between rows."""
        return jnp.moveaxis(self.at(keys - queries[:, :, None]), 0, 1)

    def dense(
        self, offset: Int[Array, ""] | int, queries: int, keys: int
    ) -> Float[Array, "1 heads query key"]:
        """Bias of all pairs, of which the first query has index `offset`."""
        first = -(offset + queries - 1)
        by_distance = self.at(first + jnp.arange(queries + keys - 1))
        return toeplitz(by_distance, queries, keys)[None]


@pytree
@dataclasses.dataclass(frozen=True)
class LinearBias(DistanceBias):
    """slope distance: attention with linear biases (Press et al. 2022, arXiv:2108.12409).

    The slopes are constants: they get no gradient.
    """

    slopes: Float[Array | np.ndarray, "heads"]

    @property
    def num_heads(self) -> int:
        """See `DistanceBias`."""
        return self.slopes.shape[0]

    def at(self, distance: Int[Array, "*shape"]) -> Float[Array, "heads *shape"]:
        """See `DistanceBias.at`."""
        slopes = jax.lax.stop_gradient(jnp.asarray(self.slopes, jnp.float32))
        return slopes.reshape(-1, *(1 for _ in distance.shape)) * distance.astype(jnp.float32)


@pytree
@dataclasses.dataclass(frozen=True)
class BucketBias(DistanceBias):
    """A learned number for each head and bucket of distances (T5, arXiv:1910.10683, section 2.1).

    Attributes:
        table: the numbers.
        max_distance: from there on all distances are in one bucket.
        causal: whether all buckets are for keys before the query; else half of them are.
    """

    table: Float[Array, "heads buckets"]
    max_distance: int = dataclasses.field(metadata={"static": True})
    causal: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_heads(self) -> int:
        """See `DistanceBias`."""
        return self.table.shape[0]

    def at(self, distance: Int[Array, "*shape"]) -> Float[Array, "heads *shape"]:
        """See `DistanceBias.at`."""
        buckets = bucket(distance, self.table.shape[1], self.max_distance, self.causal)
        table = self.table.astype(jnp.float32)
        rows = jax.typeof(buckets).sharding.spec
        if all(entry is None for entry in rows):
            return table[:, buckets]
        heads = jax.typeof(table).sharding.spec[0]
        return table.at[:, buckets].get(out_sharding=PartitionSpec(heads, *rows))


Bias: TypeAlias = Float[Array, "#batch #heads #query #key"] | DistanceBias


def bucket(
    distance: Int[Array, "*shape"], buckets: int, max_distance: int, causal: bool
) -> Int[Array, "*shape"]:
    """The bucket of each distance: half of them single distances, the others growing as a log.

    Args:
        distance: index of the key less that of the query.
        buckets: how many there are.
        max_distance: from there on all distances are in one bucket.
        causal: whether all buckets are for keys before the query; else the upper half are for keys
            after it.
    """
    count = buckets if causal else buckets // 2
    behind = 0 if causal else jnp.where(distance > 0, count, 0)
    distance = jnp.maximum(-distance, 0) if causal else jnp.abs(distance)
    exact = count // 2
    growth = (count - exact) / math.log(max_distance / exact)
    far = exact + jnp.log(jnp.maximum(distance, exact) / exact) * growth
    far = jnp.minimum(far.astype(jnp.int32), count - 1)
    return behind + jnp.where(distance < exact, distance, far)


def toeplitz(
    diagonals: Float[Array, "heads distances"], queries: int, keys: int
) -> Float[Array, "heads query key"]:
    """Matrices [i, j] of the numbers at j - i + queries - 1, by copies and without a gather."""
    heads, length = diagonals.shape
    if not isinstance(queries, int):  # of a program that is exported for any number
        index = jnp.arange(keys)[None] - jnp.arange(queries)[:, None] + queries - 1
        return diagonals[:, index]
    if queries == 1:
        return diagonals[:, None, :keys]
    # Repeated and cut into rows that are shorter by one, every row begins one number earlier.
    flat = jnp.broadcast_to(diagonals[:, None], (heads, queries, length)).reshape(heads, -1)
    flat = flat[:, queries - 1 : queries - 1 + queries * (length - 1)]
    return flat.reshape(heads, queries, length - 1)[:, :, :keys]
