"""Attention in plain XLA whose memory grows linearly with the length.

Short sequences go through a Python loop over blocks of queries, each with the keys that it needs
and no others; long ones, and rows of scores too big to hold, through `streaming`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Mask, Tile
from pallas_kernels.attention.reference import FORBIDDEN, group_bias
from pallas_kernels.attention.streaming import streaming

ROWS = 128  # queries of a block
BLOCKS = 16  # more blocks than these would be slow to compile
BLOCK_BYTES = 2**28  # of one block's scores
SAVED_BYTES = 2**28  # of all scores: above this the backward pass computes them again


def chunked(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Float[Array, "..."] | None = None,
    *,
    scale: float,
) -> Float[Array, "batch query heads value_dim"]:
    """Attention that holds the scores of one block of queries at a time."""
    batch, query_length, heads, _ = q.shape
    row_bytes = 4 * batch * heads * k.shape[1]
    rows = min(ROWS, query_length)
    if query_length > ROWS * BLOCKS or rows * row_bytes > BLOCK_BYTES:
        return streaming(q, k, v, mask, bias, scale=scale)
    return blockwise(
        q, k, v, mask, bias, scale=scale, recompute=query_length * row_bytes > SAVED_BYTES
    )


def blockwise(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Float[Array, "..."] | None = None,
    *,
    scale: float,
    rows: int = ROWS,
    recompute: bool = False,
) -> Float[Array, "batch query heads value_dim"]:
    """A Python loop over blocks of `rows` queries, each with only the keys its rows may see.

    Args:
        recompute: compute a block's scores again in the backward pass instead of keeping them.
    """
    batch, query_length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, query_length, kv_heads, heads // kv_heads, head_dim)
    grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4))
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    if bias is not None:
        bias = group_bias(bias, kv_heads)

    outputs = []
    for start in range(0, query_length, rows):
        stop = min(start + rows, query_length)
        first, end = mask.key_range(start, stop, k.shape[2])
        first = min(first, end - 1) if end else 0  # rows that see nothing still need a key
        end = max(end, 1)

        def block(q, k, v, mask, bias, place=(start, stop, first, end)):
            return _block(q, k, v, mask, bias, place=place, scale=scale)

        if recompute:
            block = jax.checkpoint(block)
        outputs.append(
            block(
                grouped[:, :, :, start:stop],
                k[:, :, first:end],
                v[:, :, first:end],
                mask,
                _bias_part(bias, (start, stop), (first, end)),
            )
        )
    output = jnp.transpose(jnp.concatenate(outputs, axis=3), (0, 3, 1, 2, 4))
    return output.reshape(batch, query_length, heads, v.shape[-1]).astype(q.dtype)


def _block(q, k, v, mask: Mask, bias, *, place, scale):
    """Attention of the rows of one block to the keys of its range, in float32."""
    start, stop, first, end = place
    exact = jnp.promote_types(jnp.float32, q.dtype)
    scores = scale * jnp.einsum("bngtd,bnsd->bngts", q, k, preferred_element_type=exact)
    if bias is not None:
        scores += bias.astype(exact)
    allowed = None
    if mask.tile((start, stop), (first, end)) is not Tile.FULL:
        allowed = mask.allowed(
            jnp.arange(start, stop),
            jnp.arange(first, end),
            None if mask.query_segments is None else mask.query_segments[:, start:stop],
            None if mask.key_segments is None else mask.key_segments[:, first:end],
        )[:, None, None]
        scores = jnp.where(allowed, scores, FORBIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    output = jnp.einsum("bngts,bnsd->bngtd", weights, v, preferred_element_type=exact)
    if allowed is not None and mask.may_blind(start, stop, end):
        output = jnp.where(jnp.any(allowed, axis=-1, keepdims=True), output, 0.0)
    return output


def _bias_part(bias, rows: tuple[int, int], keys: tuple[int, int]):
    """The part of a grouped bias that belongs to these rows and keys; axes of 1 stay."""
    if bias is None:
        return None
    if bias.shape[3] > 1:
        bias = bias[:, :, :, slice(*rows)]
    return bias[..., slice(*keys)] if bias.shape[4] > 1 else bias
