"""Sizes of the forward kernel's work: those of the table, fitted to a call."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.tpu.lowering import round_up
from pallas_kernels.block_sizes import block_sizes

LANES = 128
SPAN_BYTES = 2**23  # of keys and values, of which VMEM has two spans at a time
PAIRS_BYTES = 2**21  # of a bias with a number for each pair


@dataclasses.dataclass(frozen=True)
class Blocks:
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

    def fitted(self, queries: int, keys: int, key_bytes: int, pair_bytes: int) -> Blocks:
        """Sizes for so many queries and keys, with as little padding as their number allows.

        Args:
            key_bytes: of a key and its value.
            pair_bytes: of a pair in an array of a bias, 0 without.
        """
        query, chunk_queries = self.query, self.chunk_queries
        if pair_bytes:
            query = min(query, chunk_queries)
        query, chunk_queries = _even(queries, query, chunk_queries, self.part)
        key, chunk_keys = _even(keys, self.key, self.chunk_keys, self.part)
        most = min(self.span, SPAN_BYTES // (2 * key_bytes))
        if pair_bytes:
            most = min(most, PAIRS_BYTES // (pair_bytes * query))
        tiles = -(-keys // key)
        spans = -(-tiles // max(most // key, 1))
        # Rows of numbers of keys come eight at a time where there are several spans.
        span = -(-tiles // spans) * key
        if spans > 1 and span % (8 * self.part):
            span = round_up(span, 8 * self.part)
            key = max(size for size in range(chunk_keys, key + 1, chunk_keys) if span % size == 0)
        return dataclasses.replace(
            self,
            span=span,
            key=key,
            query=query,
            chunk_keys=chunk_keys,
            chunk_queries=chunk_queries,
        )


def _even(length: int, size: int, chunk: int, part: int) -> tuple[int, int]:
    """Size of equal tiles that are no larger than `size`, and of their chunks."""
    chunk = min(chunk, round_up(length, part))
    tiles = -(-length // size)
    return round_up(-(-length // tiles), chunk), chunk


def forward_blocks(chip: str, q: Any, k: Any, v: Any, mask: Mask, pair_bytes: int) -> Blocks:
    """Sizes for a call: those of the table for this chip, fitted."""
    sizes = block_sizes(
        "attention_forward",
        chip,
        head_dim=max(q.shape[-1], v.shape[-1]),
        value_bytes=q.dtype.itemsize,
        segments=int(mask.query_segments is not None),
    )
    # A head of fewer than 128 numbers takes the room of 128.
    dims = round_up(k.shape[-1], LANES) + v.shape[-1]
    return Blocks(**sizes).fitted(q.shape[1], k.shape[1], dims * k.dtype.itemsize, pair_bytes)
