"""Sizes of the forward kernel's work: those of the table, fitted to a call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.tpu.lowering import round_up
from pallas_kernels.block_sizes import block_sizes

LANES = 128
# Of VMEM, 16 MiB on a TPU v4; it has two blocks of each array at a time.
SPAN_BYTES = 2**22  # of keys and values
PAIRS_BYTES = 2**21  # of a bias with a number for each pair
STRIP_BYTES = 2**20  # of the output of a tile of queries, float32


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
    """Sizes of the forward kernel's work, each a multiple of those after it.

    Attributes:
        span: keys in VMEM at a time.
        key, query: of a tile.
        chunk_keys, chunk_queries: of a rectangle of scores that is held at a time.
        part: side of the smallest rectangle whose class is looked at.
        ahead: how many rectangles the products of keys and queries are ahead of their softmax.
    """

    span: int
    key: int
    query: int
    chunk_keys: int
    chunk_queries: int
    part: int = LANES
    ahead: int = 1

    def fitted(
        self, queries: int, keys: int, dims: tuple[int, int], key_bytes: int, pair_bytes: int
    ) -> ForwardBlocks:
        """Sizes for so many queries and keys, with as little padding as their number allows.

        Args:
            dims: of a head's keys and values.
            key_bytes: of a key and its value.
            pair_bytes: of a pair in an array of a bias, 0 without.
        """
        most = STRIP_BYTES // (4 * max(dims))
        most = max(min(most, self.query), self.part) // self.part * self.part
        query, chunk_queries = _even(queries, most, min(self.chunk_queries, most), self.part)
        if pair_bytes:
            query = chunk_queries
        key, chunk_keys = _even(keys, self.key, self.chunk_keys, self.part)
        most = min(self.span, SPAN_BYTES // key_bytes)
        if pair_bytes:
            most = min(most, PAIRS_BYTES // (pair_bytes * query))
        key = min(key, max(most // chunk_keys, 1) * chunk_keys)
        tiles = -(-keys // key)
        spans = -(-tiles // (most // key))
        span = -(-tiles // spans) * key
        if spans > 1:
            # Rows of numbers of keys come eight at a time where there are several spans.
            span = round_up(span, math.lcm(8 * self.part, chunk_keys))
            key = max(size for size in range(chunk_keys, key + 1, chunk_keys) if span % size == 0)
        sizes = {"chunk_keys": chunk_keys, "chunk_queries": chunk_queries}
        return dataclasses.replace(self, span=span, key=key, query=query, **sizes)


def _even(length: int, size: int, chunk: int, part: int) -> tuple[int, int]:
    """Size of equal tiles that are no larger than `size`, and of their chunks."""
    chunk = min(chunk, round_up(length, part))
    tiles = -(-length // size)
    return round_up(-(-length // tiles), chunk), chunk


def forward_blocks(chip: str, q: Any, k: Any, v: Any, mask: Mask, pair_bytes: int) -> ForwardBlocks:
    """Sizes for a call: those of the table for this chip, fitted."""
    sizes = block_sizes(
        "attention_forward",
        chip,
        head_dim=max(q.shape[-1], v.shape[-1]),
        value_bytes=q.dtype.itemsize,
        segments=int(mask.query_segments is not None),
    )
    dims = k.shape[-1], v.shape[-1]
    # Keys of fewer than 128 numbers take the room of 128.
    key_bytes = (round_up(dims[0], LANES) + dims[1]) * k.dtype.itemsize
    return ForwardBlocks(**sizes).fitted(q.shape[1], k.shape[1], dims, key_bytes, pair_bytes)
