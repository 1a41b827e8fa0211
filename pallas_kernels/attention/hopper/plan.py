"""The static part of a call, and the sizes that follow from it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Sizes of tiles and depths of pipelines of the three kernels.

    Attributes:
        rows: of a warpgroup's part of a tile: queries, and in the kernel of keys' gradients keys.
        forward_keys, query_gradient_keys: keys of a tile, of which both warpgroups have `rows`
            queries.
        key_gradient_queries: queries of a tile, of which a warpgroup has `rows` keys.
        forward_stages, key_gradient_stages: tiles in shared memory.
        query_gradient_stages: tiles of keys and of values there.
    """

    rows: int = 64
    forward_keys: int = 128
    query_gradient_keys: int = 64
    key_gradient_queries: int = 64
    forward_stages: int = 2
    query_gradient_stages: tuple[int, int] = (2, 2)
    key_gradient_stages: int = 2


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """The static part of a call; lengths are the true ones, arrays are padded to whole blocks.

    Attributes:
        query_length, key_length: numbers of queries and keys.
        group: query heads that share a key head.
        scale, softcap: of the scores.
        causal_by_position, window: of the mask.
        offset: of the mask; None: a kernel reads it from an array.
        dropout: rate, or None.
        blocks: sizes of tiles.
        interpret: what Pallas takes.
    """

    query_length: int
    key_length: int
    group: int
    scale: float
    softcap: float | None
    causal_by_position: bool
    window: int | None
    offset: int | None
    dropout: float | None
    blocks: TileSizes
    interpret: object


COLUMNS = 128  # of a gradient of keys or values that one warpgroup's registers hold


def columns(head_dim: int, value_dim: int) -> int:
    """Parts into which heads are cut where keys' gradients are computed: a warpgroup has one."""
    return 1 if max(head_dim, value_dim) <= COLUMNS else 2


def padded(size: int, multiple: int) -> int:
    """The least multiple that is no smaller."""
    return -(-size // multiple) * multiple


def default_blocks(head_dim: int, value_dim: int) -> TileSizes:
    """Sizes for padded heads, so that 227 KB of shared memory and the registers suffice."""
    widest = max(head_dim, value_dim)
    if widest <= 64:
        return TileSizes(
            forward_stages=4,
            query_gradient_keys=128,
            query_gradient_stages=(3, 3),
            key_gradient_stages=4,
        )
    if widest <= 128:
        return TileSizes(query_gradient_stages=(3, 3), key_gradient_stages=3)
    return TileSizes(forward_keys=64, query_gradient_stages=(2, 1))
