"""Sizes of the backward kernel's work: those of the table, fitted to a call."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.attention.bias import Bias, DistanceBias
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.tpu.lowering import round_up
from pallas_kernels.block_sizes import block_sizes

LANES = 128
PAIRS_BYTES = 2**21  # of a step's part of the gradient of a bias with a number for each pair
SPAN_SHARE = 0.8  # of the memory, for what belongs to a span of keys


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
    """Sizes of the backward kernel's work.

    Attributes:
        query: queries of a step.
        key: keys of a tile.
        span: keys that stay in VMEM.
        strip: keys whose scores are held together.
        edge_strip: the same in tiles with a mask: less of a small strip is where nothing is seen.
        transposed: whether the gradient of the queries is summed transposed, which fills matrix
            units that are wider than a head.
        memory: MiB of VMEM that the kernel may use.
        shares: of the query heads of a key head, as many as the chip has cores where there are not
            key heads enough for all of them; else 1.
        part: side of the smallest rectangle whose class is looked at.
    """

    query: int
    key: int
    span: int
    strip: int
    edge_strip: int
    transposed: int
    memory: int
    shares: int = 1
    part: int = LANES

    def fitted(self, queries: int, keys: int, key_bytes: int, pairs: bool) -> BackwardBlocks:
        """Sizes for so many queries and keys, with as little padding as their number allows.

        Args:
            key_bytes: that a key takes in VMEM.
            pairs: whether there is a bias with a number for each pair.
        """
        query, key = (
            round_up(-(-length // -(-length // most)), self.part)
            for length, most in ((queries, self.query), (keys, self.key))
        )
        most = min(self.span, int(SPAN_SHARE * self.memory * 2**20) // key_bytes)
        if pairs:
            most = min(most, PAIRS_BYTES // (4 * query))
        tiles = -(-keys // key)
        spans = -(-tiles // max(1, most // key))
        span = -(-tiles // spans) * key
        return dataclasses.replace(self, query=query, key=key, span=span)


def has_pairs(bias: Bias | None) -> bool:
    """Returns whether a bias has a number for each pair."""
    return bias is not None and not isinstance(bias, DistanceBias) and 1 not in bias.shape[2:]


def backward_blocks(
    chip: str, q: Any, k: Any, v: Any, mask: Mask, bias: Bias | None
) -> BackwardBlocks:
    """Sizes for a call: those of the table for this chip, fitted."""
    sizes = block_sizes(
        "attention_backward",
        chip,
        head_dim=max(q.shape[-1], v.shape[-1]),
        value_bytes=q.dtype.itemsize,
        segments=int(mask.query_segments is not None),
    )
    batch, _, kv_heads, head_dim = k.shape
    cores = sizes.pop("shares", 1)
    alone = batch * kv_heads % cores == 0 or q.shape[2] // kv_heads % cores != 0
    shares = 1 if alone else cores
    # Two copies of keys, values and their gradients, and sums of these if they are not float32.
    bytes_of_number = 2 * k.dtype.itemsize + (2 * k.dtype.itemsize + 4 if shares == 1 else 8)
    key_bytes = (round_up(head_dim, LANES) + round_up(v.shape[-1], LANES)) * bytes_of_number
    blocks = BackwardBlocks(**sizes, shares=shares)
    return blocks.fitted(q.shape[1], k.shape[1], key_bytes, has_pairs(bias))
