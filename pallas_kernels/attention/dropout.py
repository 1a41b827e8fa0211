"""Dropout of attention weights by a counter: every implementation drops the same pairs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Weights that are zeroed: each with a probability of `rate`, the others raised to match.

    A row of weights has a random number, its seed; a weight is dropped by a hash of its row's seed
    and its key's index. So no array over pairs is drawn, a kernel makes the mask of a tile where it
    needs it, and rows may be cut over devices.

    Attributes:
        seeds: random numbers, one for each row.
        rate: share of weights that are dropped.
    """

    seeds: UInt32[Array, "batch heads query"]
    rate: float = dataclasses.field(metadata={"static": True})


def factors(
    seeds: UInt32[Array, "*rows"], keys: Int[Array, "key"], rate: float
) -> Float[Array, "*rows key"]:
    """Factors of the weights: 0 where dropped, else 1 / (1 - rate); float32."""
    return jnp.where(kept(seeds, keys, rate), jnp.float32(1 / (1 - rate)), 0.0)


def kept(
    seeds: UInt32[Array, "*rows"], keys: Int[Array, "key"], rate: float
) -> Bool[Array, "*rows key"]:
    """True where the weight of a row with this seed for the key with this index is kept."""
    return kept_at(seeds[..., None], keys, rate)


def kept_at(
    seeds: UInt32[Array, "#*shape"], keys: Int[Array, "#*shape"], rate: float
) -> Bool[Array, "*shape"]:
    """True where a weight is kept, each of a row with this seed for the key with this index."""
    return mixed(seeds ^ (keys.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))) >= threshold(rate)


def threshold(rate: float) -> jax.Array:
    """The least hash of a weight that is kept, uint32."""
    return jnp.uint32(min(int(rate * 2**32), 2**32 - 1))


def mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijective hash: a change of one bit flips each bit of the result half of the time.

    Two multiplications, with the multipliers that a search for the least bias has found for this
    form (C. Wellons, Hash Function Prospector, 2018, and its results of 2022).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
