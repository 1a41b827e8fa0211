"""Everything around the TPU kernels: layouts, padding, lists of tiles, operands.

In the kernels scores have the keys along sublanes and the queries along lanes, so that a number of
a query is a row that broadcasts for free and the statistics of the softmax are reduced without
crossing lanes. Numbers of queries or of keys come in rows of `part`, the side of the smallest
rectangle of pairs that a kernel looks at.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.attention.bias import DistanceBias, LinearBias
from pallas_kernels.attention.mask import HostOrDevice, Mask, Tile
from pallas_kernels.attention.tiles import HIGH, tiles

LOG2E = math.log2(math.e)
MOST_KINDS = 14  # of tiles, which share four bits with the empty one


@dataclasses.dataclass(frozen=True)
class Rules:
    """Facts of a call that are known while tracing, alike in forward and backward.

    Attributes:
        scale, softcap: as `attention` takes them.
        causal, window: what the mask rules out by position.
        query_length, key_length: without padding.
        dropout: rate, 0.0 without.
        kind: of the chip.
        interpret: what Pallas takes as its `interpret`.
    """

    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    query_length: int
    key_length: int
    dropout: float
    kind: str
    interpret: Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """Facts of a tile that are known while tracing.

    Attributes:
        parts: class by position alone of each part: of some keys (outer) and some queries (inner).
        arrays: whether segments and ranks have to be compared.
    """

    parts: tuple[tuple[Tile, ...], ...]
    arrays: bool


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-number // multiple) * multiple


def pad_to(a: jax.Array, axis: int, size: int, value: Any = 0) -> jax.Array:
    """An array with more numbers of one value at the end of an axis."""
    more = size - a.shape[axis]
    widths = [(0, more if at == axis % a.ndim else 0) for at in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value) if more else a


def rows_first(
    a: Float[Array, "batch length heads dim"], length: int, dim: int
) -> Float[Array, "batch heads padded_length padded_dim"]:
    """Queries, keys or values with the heads outside, padded by zeros."""
    return pad_to(pad_to(jnp.swapaxes(a, 1, 2), 2, length), 3, dim)


def lanes_first(
    a: Float[Array, "batch length heads dim"], length: int, dim: int, part: int
) -> Float[Array, "batch heads parts padded_dim part"]:
    """Queries or values transposed, with the heads outside, padded by zeros, cut into parts.

    The numbers of a part follow each other in memory, so that registers of 16-bit numbers, which
    have 16 rows where memory has tiles of 8, are loaded at once.
    """
    a = pad_to(pad_to(a, 1, length), 3, dim)
    a = a.reshape(a.shape[0], length // part, part, *a.shape[2:])
    return jnp.transpose(a, (0, 3, 1, 4, 2))


def in_rows(a: Array, length: int, part: int, value: Any = 0) -> Array:
    """Numbers `[..., n]`, padded to a length, in rows `[..., length / part, part]`."""
    a = pad_to(a, -1, length, value)
    return a.reshape(*a.shape[:-1], length // part, part)


def query_numbers(mask: Mask, length: int) -> dict[str, Int32[Array, "#batch 1 length"]]:
    """Segments and ranks of the queries; a query of padding sees nothing."""
    found = {}
    if mask.query_segments is not None:
        segments = jnp.asarray(mask.query_segments, jnp.int32)
        found["segments"] = pad_to(jnp.where(segments == 0, -2, segments), 1, length, -2)
    if mask.query_ranks is not None:
        found["ranks"] = pad_to(jnp.asarray(mask.query_ranks, jnp.int32), 1, length, -HIGH)
    return {name: a[:, None] for name, a in found.items()}


def key_numbers(mask: Mask, length: int, part: int) -> dict[str, Int32[Array, "#batch rows part"]]:
    """Segments and ranks of the keys in rows; a key of padding is seen by nothing."""
    found = {}
    if mask.key_segments is not None:
        segments = jnp.asarray(mask.key_segments, jnp.int32)
        found["segments"] = in_rows(jnp.where(segments == 0, -1, segments), length, part, -1)
    if mask.key_ranks is not None:
        found["ranks"] = in_rows(jnp.asarray(mask.key_ranks, jnp.int32), length, part, HIGH)
    return found


def by_difference(
    bias: DistanceBias, offset: Any, queries: int, keys: int, part: int
) -> Float[Array, "heads rows part"]:
    """A bias at all differences e = query row - key, times log2(e), e = 0 at index keys + part.

    Args:
        offset: of the mask.
        queries, keys: padded lengths, multiples of `part`.
    """
    difference = jnp.arange(queries + keys + 2 * part) - (keys + part)
    numbers = bias.at(-difference - offset) * LOG2E
    return numbers.reshape(numbers.shape[0], -1, part)


def array_bias(
    bias: Float[Array, "#batch #heads #query #key"], queries: int, keys: int, part: int
) -> dict[str, jax.Array]:
    """An array of a bias: `query_bias` or `key_bias` if it is the same for all keys or queries.

    Else `bias` [#batch, #heads, padded_key, padded_query], transposed as the scores are, in its
    own dtype; the others are float32 and times log2(e).
    """
    if bias.shape[3] == 1:
        rows = jnp.swapaxes(bias, 2, 3).astype(jnp.float32) * LOG2E
        if rows.shape[3] > 1:
            return {"query_bias": pad_to(rows, 3, queries)}
        return {"query_bias": jnp.broadcast_to(rows, (*rows.shape[:3], queries))}
    if bias.shape[2] == 1:
        return {"key_bias": in_rows(bias[:, :, 0].astype(jnp.float32) * LOG2E, keys, part)}
    return {"bias": pad_to(pad_to(jnp.swapaxes(bias, 2, 3), 2, keys), 3, queries)}


def slopes(bias: LinearBias) -> Float[Array, "heads"]:
    """Slopes for scores of base 2."""
    return jax.lax.stop_gradient(jnp.asarray(bias.slopes, jnp.float32)) * LOG2E


def tile_codes(
    mask: Mask, queries: int, keys: int, query_tile: int, key_tile: int, part: int
) -> tuple[Int[Array | np.ndarray, "#batch query_tiles key_tiles"], tuple[Kind, ...]]:
    """Codes of all tiles, 0 for empty ones, and the kinds: a code c > 0 is of `kinds[c - 1]`.

    The kinds are few and known while tracing, so that a kernel has a body of code for each.

    Args:
        queries, keys: lengths without padding.
        part: side of the parts of a tile whose classes are told apart.
    """
    classes = tiles(mask, queries, keys, query_tile, key_tile)
    shape = query_tile // part, key_tile // part
    full = Kind(_alike(Tile.FULL, shape), arrays=False)
    arrays = mask.query_segments is not None or mask.query_ranks is not None
    patterns, numbers = _patterns(mask, classes.shape[1:], (query_tile, key_tile), keys, part)
    kinds = [full, *(Kind(pattern, arrays) for pattern in patterns)]
    xp = np if isinstance(classes, np.ndarray) else jnp
    codes = xp.where(classes == Tile.EMPTY, 0, xp.where(classes == Tile.FULL, 1, 2 + numbers))
    return codes.astype(np.int32), tuple(kinds)


def _alike(tile: Tile, shape: tuple[int, int]) -> tuple[tuple[Tile, ...], ...]:
    """Parts of one class, of a tile with so many parts of queries and of keys."""
    return ((tile,) * shape[0],) * shape[1]


def _patterns(mask: Mask, counts, tile: tuple[int, int], keys: int, part: int):
    """Patterns of classes of parts by position, and the number of the pattern of every tile."""
    shape = tile[0] // part, tile[1] // part
    anything = [_alike(Tile.PARTIAL, shape)], np.zeros(counts, np.int32)
    if not isinstance(mask.offset, int):
        return anything
    # A pattern depends on how far the tile is from the diagonal, and on where the keys end in it.
    first = mask.offset + np.arange(counts[0])[:, None] * tile[0] - np.arange(counts[1]) * tile[1]
    end = np.minimum(keys - np.arange(counts[1]) * tile[1], tile[1])
    pairs = np.stack([first, np.broadcast_to(end, counts)], axis=-1).reshape(-1, 2)
    different, which = np.unique(pairs, axis=0, return_inverse=True)
    position = Mask(causal=mask.causal_by_position, window=mask.window)
    patterns = [_pattern(position, int(f), int(e), shape, part) for f, e in different]
    used = list(dict.fromkeys(p for p in patterns if any(map(any, p))))
    if mask.query_segments is None and mask.query_ranks is None:
        used = [p for p in used if p != _alike(Tile.FULL, shape)]
    if len(used) > MOST_KINDS - 1:
        return anything
    numbers = np.array([used.index(p) if p in used else 0 for p in patterns], np.int32)
    return used, numbers[which].reshape(counts)


def _pattern(position: Mask, first: int, end: int, shape: tuple[int, int], part: int):
    """Classes of the parts of a tile whose first query is `first` after its first key, and which
    has keys before `end` alone."""
    rows = []
    for key in range(0, shape[1] * part, part):
        whole = key + part <= end
        row = []
        for query in range(0, shape[0] * part, part):
            mask = dataclasses.replace(position, offset=first + query - key + part)
            # Keys `part` to 2 `part`, so that none has a negative index.
            tile = mask.tile((0, part), (part, 2 * part)) if key < end else Tile.EMPTY
            row.append(tile if whole or tile == Tile.EMPTY else Tile.PARTIAL)
        rows.append(tuple(row))
    return tuple(rows)


class TileLists(NamedTuple):
    """The tiles of each row of tiles that are not empty, span by span.

    Attributes:
        entries: 16 times the index of a tile within its span plus its code.
        counts: how many tiles each walk over a span has.
        spans: the span of each walk. Those without tiles come last and repeat the one before, of
            which nothing has to be fetched again.
    """

    entries: Int32[HostOrDevice, "#batch rows walks tiles"]
    counts: Int32[HostOrDevice, "#batch rows walks"]
    spans: Int32[HostOrDevice, "#batch rows walks"]


def tile_lists(codes: Int[HostOrDevice, "#batch rows tiles"], span: int) -> TileLists:
    """Lists of tiles with as many walks as a row needs, where that is known while tracing.

    Args:
        span: tiles that a kernel walks over at a time.
    """
    xp = np if isinstance(codes, np.ndarray) else jnp
    more = round_up(codes.shape[2], span) - codes.shape[2]
    codes = xp.pad(codes, ((0, 0), (0, 0), (0, more)))
    codes = codes.reshape(*codes.shape[:2], -1, span)
    entries = xp.arange(span, dtype=np.int32) * 16 + codes
    order = xp.argsort(codes == 0, axis=-1, stable=True)
    entries = xp.take_along_axis(entries, order, axis=-1)
    counts = (codes != 0).sum(axis=-1)

    order = xp.argsort(counts == 0, axis=-1, stable=True)
    counts = xp.take_along_axis(counts, order, axis=-1)
    entries = xp.take_along_axis(entries, order[..., None], axis=2)
    used = (counts > 0).sum(axis=-1, keepdims=True)
    last = xp.take_along_axis(order, xp.maximum(used - 1, 0), axis=-1)
    spans = xp.where(xp.arange(order.shape[-1]) < used, order, last)
    walks = max(int(used.max()), 1) if xp is np else order.shape[-1]
    lists = entries[:, :, :walks], counts[..., :walks], spans[..., :walks]
    return TileLists(*(a.astype(np.int32) for a in lists))
