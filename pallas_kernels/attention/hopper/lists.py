"""Lists of the tiles that a block of queries, or of keys, has to visit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.attention.mask import Mask, Tile
from pallas_kernels.attention.tiles import tiles


class HopperTileLists(NamedTuple):
    """For each block of one side the blocks of the other side: full tiles first, partial ones next.

    Attributes:
        order: the other side's blocks; those of empty tiles are at the end.
        counts: of full tiles and of non-empty ones.
        longest: the blocks, the one with most tiles first: started first, it ends no later than
            others.
    """

    order: Int32[Array | np.ndarray, "#batch blocks others"]
    counts: Int32[Array | np.ndarray, "#batch blocks 2"]
    longest: Int32[Array | np.ndarray, "#batch blocks"]


def by_queries(
    mask: Mask, queries: int, keys: int, query_block: int, key_block: int
) -> HopperTileLists:
    """Lists of key blocks for every block of queries."""
    return _lists(tiles(mask, queries, keys, query_block, key_block))


def by_keys(
    mask: Mask, queries: int, keys: int, query_block: int, key_block: int
) -> HopperTileLists:
    """Lists of query blocks for every block of keys."""
    return _lists(tiles(mask, queries, keys, query_block, key_block).swapaxes(1, 2))


def _lists(classes) -> HopperTileLists:
    xp = np if isinstance(classes, np.ndarray) else jnp
    # Sorted as 0 full, 1 partial, 2 empty; a stable sort walks through memory in order.
    order = xp.argsort(Tile.FULL - classes, axis=-1, stable=True)
    counts = [(classes == Tile.FULL).sum(-1), (classes != Tile.EMPTY).sum(-1)]
    longest = xp.argsort(-counts[1], axis=-1, stable=True)
    lists = HopperTileLists(order, xp.stack(counts, axis=-1), longest)
    return jax.tree.map(lambda a: a.astype(np.int32), lists)
