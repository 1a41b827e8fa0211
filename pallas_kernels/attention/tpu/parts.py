"""Scores of a rectangle of pairs, as the forward and the backward kernel both compute them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.dropout import kept_at
from pallas_kernels.attention.mask import Tile
from pallas_kernels.attention.scores import FORBIDDEN
from pallas_kernels.attention.tpu.lowering import LOG2E, Rules

SUBLANES = 8
LEAST = -1e29  # where a running maximum starts: 2**(FORBIDDEN - LEAST) is exactly zero


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A rectangle of keys and queries, and the numbers that its scores depend on.

    Attributes:
        query: index of the first query, without the mask's offset.
        position: the same, counted in keys from the mask's offset.
        key: index of the first key.
        tile: its class by position.
        ends: whether keys of padding may be in it.
        query_numbers: rows [1, queries] or None: segments, ranks, seeds (uint32).
        key_numbers: arrays [keys, queries] or None: segments, ranks; None where they need not be
            compared.
        bias: times log2(e), broadcasts to [keys, queries], or None.
        slope: of a linear bias, times log2(e), or None.
    """

    query: Any
    position: Any
    key: Any
    tile: Tile
    ends: bool
    query_numbers: dict[str, jax.Array]
    key_numbers: dict[str, jax.Array]
    bias: jax.Array | None = None
    slope: Any = None


def scores(
    rules: Rules, products: Float[Array, "keys queries"], part: Pairs
) -> tuple[Float[Array, "keys queries"], Float[Array, "keys queries"] | None]:
    """Scores times log2(e), forbidden ones `FORBIDDEN`, and the derivative of the softcap or None.

    Args:
        products: of keys and queries, without the scale.
    """
    gain = None
    if rules.softcap is None:
        found = products * (rules.scale * LOG2E)
    else:
        bent = jnp.tanh(products * (rules.scale / rules.softcap))
        gain = 1 - bent * bent
        found = bent * (rules.softcap * LOG2E)
    if part.slope is not None:
        distance = part.key - part.position - _lead(products.shape)
        found += part.slope * distance.astype(jnp.float32)
    if part.bias is not None:
        found += part.bias
    allowed = _allowed(rules, products.shape, part)
    return found if allowed is None else jnp.where(allowed, found, FORBIDDEN), gain


def factors(rules: Rules, shape: tuple[int, int], part: Pairs) -> Float[Array, "keys queries"]:
    """The factors of dropout for weights: 0 or 1 / (1 - rate)."""
    keys = part.key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    kept = kept_at(part.query_numbers["seeds"], keys, rules.dropout)
    return jnp.where(kept, jnp.float32(1 / (1 - rules.dropout)), 0.0)


def column(row: Array) -> Array:
    """The numbers [1, n] of n keys as an array [n, n] that is constant along lanes."""
    size = row.shape[1]
    return jnp.broadcast_to(row, (size, size)).T


def toeplitz_part(
    here: Float[Array, "1 part"], there: Float[Array, "1 part"]
) -> Float[Array, "part part"]:
    """Numbers of differences as an array: [key, query] has the one at part + query - key.

    Args:
        here, there: rows number r and r + 1 of `lowering.by_difference`, r the index of the part of
            queries less that of the part of keys plus that of the end of the keys.
    """
    return toeplitz(jnp.concatenate([here, there], axis=1), here.shape[1])


def toeplitz(numbers: Float[Array, "1 both"], keys: int) -> Float[Array, "keys queries"]:
    """Numbers of differences as an array: [key, query] has the one at keys + query - key.

    Row r is the first one moved by r. Rows are moved together by constants, which all chips can do:
    three times for 8 rows, then these as the next 8, then 16, until all are there.
    """
    found = jnp.broadcast_to(numbers, (SUBLANES, numbers.shape[1]))
    row = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0)
    for bit in (1, 2, 4):
        found = jnp.where((row & bit) != 0, pltpu.roll(found, bit, 1), found)
    while (rows := found.shape[0]) < keys:
        found = jnp.concatenate([found, pltpu.roll(found, rows, 1)], axis=0)
    return found[:, keys:]


def _lead(shape: tuple[int, int]):
    """Index of the query less that of the key, both counted from the rectangle's first."""
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return query - jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def _allowed(
    rules: Rules, shape: tuple[int, int], part: Pairs
) -> Bool[Array, "keys queries"] | None:
    """The pairs that the mask allows, or None for all of them."""
    seen = []
    if part.tile != Tile.FULL:
        before = part.key - part.position
        if rules.causal or rules.window is not None:
            lead = _lead(shape)
        if rules.causal:
            seen.append(lead >= before)
        if rules.window is not None:
            seen.append(lead < before + rules.window)
            if not rules.causal:
                seen.append(lead > before - rules.window)
        if part.ends:
            keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            seen.append(keys < rules.key_length - part.key)
    if "segments" in part.key_numbers:
        seen.append(part.key_numbers["segments"] == part.query_numbers["segments"])
    if "ranks" in part.key_numbers:
        seen.append(part.key_numbers["ranks"] <= part.query_numbers["ranks"])
    if not seen:
        return None
    allowed = seen[0]
    for one in seen[1:]:
        allowed &= one
    return allowed
