"""Tiles: which rectangles of queries and keys are empty, partial or full under a mask.

Of segments and ranks only the extremes of each block are looked at, so that the tiles of a row of
length n cost n + (n / block)^2 operations, once a step. Of the masks in use (documents packed one
after another, windows, prefixes and blanks within documents, permutations) every tile that is
called non-empty has a pair that is allowed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8

from pallas_kernels.attention.mask import Mask, Tile

HIGH = np.int32(2**31 - 1)


def tiles(
    mask: Mask, queries: int, keys: int, query_block: int, key_block: int
) -> Int8[Array | np.ndarray, "#batch query_blocks key_blocks"]:
    """The class of every tile, as `Tile` numbers them; of numpy where it is known while tracing.

    Args:
        mask: whose arrays have these lengths; `batch` is 1 where it has none.
        queries, keys: their numbers. The last block of either may have fewer than the others; a
            tile with fewer keys is never full.
        query_block, key_block: size of a tile.
    """
    leaves = jax.tree.leaves(mask)
    xp = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
    q_arrays, k_arrays = (
        (mask.query_segments, mask.query_ranks),
        (mask.key_segments, mask.key_ranks),
    )
    q = _blocks(xp, *q_arrays, queries, query_block, mask.offset, axis=2)
    k = _blocks(xp, *k_arrays, keys, key_block, 0, axis=1)

    full = k.whole
    rows, columns = q.all, k.all
    empty = xp.zeros((), bool)
    if mask.query_segments is not None:
        low, high = xp.maximum(q.low, k.low), xp.minimum(q.high, k.high)
        empty = low > high
        full = full & q.uniform & k.uniform & ~empty
        # Where one segment alone is in both blocks, only its tokens can see each other.
        one = low == high
        rows, columns = q.of_segment(xp, low, one), k.of_segment(xp, low, one)
    if mask.causal_by_position:
        empty = empty | (rows.last < columns.first)
        full = full & (q.all.first >= k.all.last)
    if mask.window is not None:
        empty = empty | (rows.first - columns.last >= mask.window)
        full = full & (q.all.last - k.all.first < mask.window)
        if not mask.causal_by_position:
            empty = empty | (columns.first - rows.last >= mask.window)
            full = full & (k.all.last - q.all.first < mask.window)
    if mask.query_ranks is not None:
        empty = empty | (columns.lowest_rank > rows.highest_rank)
        full = full & (k.all.highest_rank <= q.all.lowest_rank)
    classes = xp.where(empty, Tile.EMPTY, xp.where(full, Tile.FULL, Tile.PARTIAL))
    shape = np.broadcast_shapes(classes.shape, (1, q.whole.shape[1], k.whole.shape[2]))
    return xp.broadcast_to(classes, shape).astype(xp.int8)


def visited(mask: Mask, queries: int, keys: int, query_block: int, key_block: int) -> Any:
    """Number of tiles of such blocks that attention computes, all rows together.

    A mask without arrays has one row.
    """
    return (tiles(mask, queries, keys, query_block, key_block) != Tile.EMPTY).sum()


class _Extremes(NamedTuple):
    """Of some tokens of each block: first and last position, lowest and highest rank."""

    first: Any
    last: Any
    lowest_rank: Any = None
    highest_rank: Any = None


class _Blocks(NamedTuple):
    """Facts of each block of queries or keys.

    Attributes:
        whole: whether the block has as many tokens as the others.
        low, high: smallest and largest segment, padding left out.
        uniform: whether all tokens are of one segment, which is not padding.
        all, lowest, highest: extremes of all tokens, of those of segment `low` and of `high`.
    """

    whole: Any
    low: Any
    high: Any
    uniform: Any
    all: _Extremes
    lowest: _Extremes
    highest: _Extremes

    def of_segment(self, xp, segment, one) -> _Extremes:
        """Extremes of the tokens of a segment where it is the lowest or highest of a block.

        Elsewhere, and where there is not `one`, those of all tokens.
        """

        def choose(everything, lowest, highest):
            found = xp.where(one & (segment == self.high), highest, everything)
            return xp.where(one & (segment == self.low), lowest, found)

        return jax.tree.map(choose, self.all, self.lowest, self.highest)


def _blocks(xp, segments, ranks, length: int, size: int, offset, axis: int) -> _Blocks:
    """The blocks of `size` tokens of rows of `length`, the first at position `offset`.

    Arrays [#batch, blocks] have one more axis at `axis`, for tiles [batch, query, key].
    """
    count = -(-length // size)

    def cut(a):
        return xp.pad(a, ((0, 0), (0, count * size - length))).reshape(-1, count, size)

    real = cut(xp.ones((1, length), bool))
    position = cut(xp.arange(length, dtype=xp.int32)[None]) + offset
    ranks = None if ranks is None else cut(ranks)

    def extremes(members) -> _Extremes:
        bounds = [*_bounds(xp, position, members)]
        if ranks is not None:
            bounds += _bounds(xp, ranks, members)
        return _Extremes(*bounds)

    low = high = uniform = None
    everything = lowest = highest = extremes(real)
    if segments is not None:
        segments = cut(segments)
        low, high = _bounds(xp, segments, segments != 0)
        uniform = (low == high) & ((segments != 0) | ~real).all(axis=-1)
        lowest, highest = (extremes(segments == end[..., None]) for end in (low, high))
    blocks = _Blocks(real.all(axis=-1), low, high, uniform, everything, lowest, highest)
    return jax.tree.map(lambda a: xp.expand_dims(a, axis), blocks)


def _bounds(xp, values, members) -> tuple[Any, Any]:
    """Least and largest of the members of each block; of none the least is the larger one."""
    least = xp.where(members, values, HIGH).min(axis=-1)
    return least, xp.where(members, values, -HIGH).max(axis=-1)
