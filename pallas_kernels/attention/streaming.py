"""Attention tile by tile with a running softmax: memory linear in length, forward and backward.

The forward pass keeps the output and each row's log of the sum of exponentials; the backward pass
makes every tile again from them (Rabe and Staats 2021, arXiv:2112.05682; Dao et al. 2022,
arXiv:2205.14135). Both walk over blocks of queries and, for each, over the blocks of keys that it
may see: tiles that causality, ranks or the window rule out are not computed, not even at a traced
offset.

Inside this file arrays are laid out as (g = query heads of a key head)
queries `[batch, kv_heads, g, query, head_dim]`, keys `[batch, kv_heads, key, head_dim]`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.bias import Bias, BucketBias, DistanceBias
from pallas_kernels.attention.dropout import Dropout, factors
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.scores import FORBIDDEN, group_heads, product
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.softcap import softcap_scores

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 128
TILE_BYTES = 2**26  # of the scores of one tile, all batch entries and heads together


@dataclasses.dataclass(frozen=True)
class CallPlan:
    """Values of a call that are known while tracing."""

    query_length: int
    key_length: int
    query_block: int
    key_block: int
    scale: float
    softcap: float | None

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.query_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.key_block)


def streaming(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    query_block: int | None = None,
    key_block: int | None = None,
) -> tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]:
    """Attention that holds one tile of scores per batch entry and head at a time.

    Args:
        query_block, key_block: size of a tile; None picks one that fits into memory.
    """
    batch, query_length, heads, head_dim = q.shape
    key_length, kv_heads = k.shape[1:3]
    plan = CallPlan(
        query_length,
        key_length,
        min(query_block or _block(batch * heads), query_length),
        min(key_block or _block(batch * heads), key_length),
        float(scale),
        softcap,
    )
    more_queries = plan.query_blocks * plan.query_block - query_length
    more_keys = plan.key_blocks * plan.key_block - key_length

    q, k, v, mask, bias, dropout = vary_alike((q, k, v, mask, bias, dropout))
    grouped = q.reshape(batch, query_length, kv_heads, heads // kv_heads, head_dim)
    grouped = _pad(jnp.transpose(grouped, (0, 2, 3, 1, 4)), 3, more_queries)
    k, v = (_pad(jnp.swapaxes(a, 1, 2), 2, more_keys) for a in (k, v))
    if bias is not None and not isinstance(bias, DistanceBias):
        bias = group_heads(bias, kv_heads)
        for axis, more in ((3, more_queries), (4, more_keys)):
            bias = _pad(bias, axis, more if bias.shape[axis] > 1 else 0)
    if dropout is not None:
        dropout = Dropout(_pad(dropout.seeds, 2, more_queries), dropout.rate)
    # More of the last one is ruled out together with it.
    mask = mask.mapped(
        lambda a: _pad(a, 1, more_queries, "edge"), lambda a: _pad(a, 1, more_keys, "edge")
    )
    output, lse = _attend(plan, grouped, k, v, mask, bias, dropout)
    output, lse = (jnp.moveaxis(a[:, :, :, :query_length], 3, 1) for a in (output, lse))
    whole = batch, query_length, heads
    return output.reshape(*whole, v.shape[-1]), lse.reshape(whole)


def _block(tiles: int) -> int:
    """Side of a tile of which so many are held together."""
    size = LARGEST_BLOCK
    while size > SMALLEST_BLOCK and 4 * tiles * size**2 > TILE_BYTES:
        size //= 2
    return size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: CallPlan, q, k, v, mask: Mask, bias, dropout):
    return _forward(plan, q, k, v, mask, bias, dropout)[0]


def _forward(plan: CallPlan, q, k, v, mask: Mask, bias, dropout):
    exact = jnp.promote_types(jnp.float32, q.dtype)

    def rows(index):
        queries = _slice(q, 3, index, plan.query_block)
        row = jnp.zeros_like(queries[..., 0], exact)

        def tile(at, carry):
            top, total, output = carry
            scores, allowed, _ = _scores(plan, queries, k, mask, bias, index, at)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
            decay = jnp.exp(top - new_top)
            total = total * decay + jnp.sum(weights, axis=-1)
            values = _slice(v, 2, at, plan.key_block)
            dropped = _dropped(plan, weights, dropout, index, at).astype(v.dtype)
            more = product("bngts,bnsd->bngtd", dropped, values)
            return new_top, total, output * decay[..., None] + more

        start = (row + FORBIDDEN, row, jnp.zeros_like(row, shape=(*row.shape, v.shape[-1])))
        first, end = _key_blocks(plan, mask, index)
        top, total, output = jax.lax.fori_loop(first, end, tile, vary_alike(start, like=q))
        blind = total == 0.0
        total = jnp.where(blind, 1.0, total)
        lse = jnp.where(blind, -jnp.inf, top + jnp.log(total))
        return (output / total[..., None]).astype(q.dtype), lse

    output, lse = (_join(blocks) for blocks in jax.lax.map(rows, jnp.arange(plan.query_blocks)))
    return (output, lse), (q, k, v, mask, bias, dropout, output, lse)


def _backward(plan: CallPlan, saved, cotangents):
    q, k, v, mask, bias, dropout, output, lse = saved
    d_output, d_lse = cotangents
    exact = lse.dtype
    weighted = jnp.sum(output.astype(exact) * d_output.astype(exact), axis=-1) - d_lse
    # Of a row that sees nothing any finite number will do: all its weights are masked.
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)

    def rows(gradients, index):
        queries, d_rows, log_rows, weighted_rows = (
            _slice(a, 3, index, plan.query_block) for a in (q, d_output, lse, weighted)
        )

        def tile(at, carry):
            d_queries, d_k, d_v, d_bias = carry
            scores, allowed, gain = _scores(plan, queries, k, mask, bias, index, at)
            weights = jnp.where(allowed, jnp.exp(scores - log_rows[..., None]), 0.0)
            keys, values = (_slice(a, 2, at, plan.key_block) for a in (k, v))
            d_weights = product("bngtd,bnsd->bngts", d_rows, values)
            d_weights = _dropped(plan, d_weights, dropout, index, at)
            d_scores = weights * (d_weights - weighted_rows[..., None])
            d_bias = _add_bias_tile(plan, d_bias, d_scores, mask, bias, index, at)
            if gain is not None:
                d_scores *= gain
            d_scores = (d_scores * plan.scale).astype(q.dtype)
            weights = _dropped(plan, weights, dropout, index, at).astype(v.dtype)
            d_queries += product("bngts,bnsd->bngtd", d_scores, keys)
            # Transposed: else XLA would transpose the tile, which is wider than the rows.
            d_k = _add(d_k, at, product("bngtd,bngts->bnds", queries, d_scores))
            d_v = _add(d_v, at, product("bngtd,bngts->bnds", d_rows, weights))
            return d_queries, d_k, d_v, d_bias

        d_queries = vary_alike(jnp.zeros_like(queries, exact), like=q)
        carry = (d_queries, *gradients)
        d_queries, *gradients = jax.lax.fori_loop(*_key_blocks(plan, mask, index), tile, carry)
        return tuple(gradients), d_queries.astype(q.dtype)

    transposed = (jnp.swapaxes(a, 2, 3) for a in (k, v))
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a, exact), (*transposed, _trainable(bias)))
    zeros = vary_alike(zeros, like=q)
    (d_k, d_v, d_bias), d_q = jax.lax.scan(rows, zeros, jnp.arange(plan.query_blocks))
    if bias is not None and d_bias is not None:
        d_bias = d_bias.astype(_trainable(bias).dtype)
        if isinstance(bias, BucketBias):
            d_bias = dataclasses.replace(bias, table=d_bias)
    d_k, d_v = (jnp.swapaxes(a, 2, 3) for a in (d_k, d_v))
    return _join(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_bias, None


_attend.defvjp(_forward, _backward)


def _dropped(plan: CallPlan, weights, dropout: Dropout | None, query_at, key_at):
    """The weights of a tile, or their gradients, after dropout."""
    if dropout is None:
        return weights
    seeds = _slice(dropout.seeds, 2, query_at, plan.query_block).reshape(weights.shape[:-1])
    return weights * factors(seeds, _indices(plan, query_at, key_at)[1], dropout.rate)


def _trainable(bias):
    """The array of a bias that gets a gradient, or None."""
    if isinstance(bias, DistanceBias):
        return bias.table if isinstance(bias, BucketBias) else None
    return bias


def _scores(plan: CallPlan, queries, k, mask: Mask, bias, query_at, key_at):
    """Scores of one tile with the forbidden ones at FORBIDDEN, which are allowed, and the
    derivative of the softcap."""
    scores = product("bngtd,bnsd->bngts", queries, _slice(k, 2, key_at, plan.key_block))
    scores, gain = softcap_scores(scores * plan.scale, plan.softcap)
    rows, keys = _indices(plan, query_at, key_at)
    if isinstance(bias, DistanceBias):
        part = group_heads(bias.tile(mask.offset + rows, keys), k.shape[1])
        scores += part.astype(scores.dtype)
    elif bias is not None:
        part = _slice(bias, 3, query_at, plan.query_block) if bias.shape[3] > 1 else bias
        part = _slice(part, 4, key_at, plan.key_block) if bias.shape[4] > 1 else part
        scores += part.astype(scores.dtype)
    part = mask.mapped(
        lambda a: _slice(a, 1, query_at, plan.query_block),
        lambda a: _slice(a, 1, key_at, plan.key_block),
    )
    allowed = part.allowed(rows, keys)
    allowed = (allowed & (keys < plan.key_length))[:, None, None]
    return jnp.where(allowed, scores, FORBIDDEN), allowed, gain


def _indices(plan: CallPlan, query_at, key_at):
    """Indices of the queries and of the keys of a tile."""
    rows = query_at * plan.query_block + jnp.arange(plan.query_block)
    return rows, key_at * plan.key_block + jnp.arange(plan.key_block)


def _key_blocks(plan: CallPlan, mask: Mask, query_at) -> tuple[Any, Any]:
    """The blocks of keys, first and end, that the rows of a block of queries may see."""
    first, end = jnp.int32(0), jnp.int32(plan.key_length)
    start = mask.offset + query_at * plan.query_block
    stop = start + plan.query_block
    if mask.causal_by_position:
        end = jnp.minimum(end, stop)
    elif mask.window is not None:
        end = jnp.minimum(end, stop - 1 + mask.window)
    if mask.window is not None:
        first = jnp.maximum(first, start - mask.window + 1)
    first, end = first // plan.key_block, -(-end // plan.key_block)
    if mask.query_ranks is not None:
        seen = _blocks_of_rank(plan, mask, query_at)
        first = jnp.maximum(first, jnp.argmax(seen))
        end = jnp.minimum(end, plan.key_blocks - jnp.argmax(seen[::-1]))
    return first, jnp.maximum(first, end)


def _blocks_of_rank(plan: CallPlan, mask: Mask, query_at) -> Bool[Array, "key_blocks"]:
    """The blocks of keys with a rank that the rows of a block of queries may see."""
    highest = jnp.max(_slice(mask.query_ranks, 1, query_at, plan.query_block), axis=1)
    blocks = mask.key_ranks.reshape(-1, plan.key_blocks, plan.key_block)
    return jnp.any(jnp.min(blocks, axis=2) <= highest[:, None], axis=0)


def _slice(a, axis: int, index, size: int):
    """Block number `index` of `size` along an axis."""
    return jax.lax.dynamic_slice_in_dim(a, index * size, size, axis)


def _add(total, index, part):
    """`total` [.., dim, key] with `part` added to its block number `index` of keys."""
    size = part.shape[3]
    summed = _slice(total, 3, index, size) + part
    return jax.lax.dynamic_update_slice_in_dim(total, summed, index * size, 3)


def _add_bias_tile(plan: CallPlan, d_bias, d_scores, mask: Mask, bias, query_at, key_at):
    """The bias gradient with one tile's part added, summed over the axes that were broadcast."""
    if d_bias is None:
        return None
    if isinstance(bias, BucketBias):
        rows, keys = _indices(plan, query_at, key_at)

        def tile(table):
            part = dataclasses.replace(bias, table=table)
            return group_heads(part.tile(mask.offset + rows, keys), d_scores.shape[1])

        _, pull = jax.vjp(tile, bias.table)
        part = jnp.sum(d_scores, axis=0, keepdims=True).astype(jnp.float32)
        return d_bias + pull(part)[0].astype(d_bias.dtype)
    broadcast = [axis for axis in range(3) if d_bias.shape[axis] == 1]
    start = [0, 0, 0, query_at * plan.query_block, key_at * plan.key_block]
    for axis in (3, 4):
        if d_bias.shape[axis] == 1:
            broadcast.append(axis)
            start[axis] = 0
    part = jnp.sum(d_scores, axis=broadcast, keepdims=True)
    old = jax.lax.dynamic_slice(d_bias, start, part.shape)
    return jax.lax.dynamic_update_slice(d_bias, old + part, start)


def _join(blocks):
    """`[block, batch, kv_heads, g, row, ...]` as `[batch, kv_heads, g, query, ...]`."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])


def _pad(a, axis: int, more: int, mode: str = "constant"):
    widths = [(0, more if at == axis else 0) for at in range(a.ndim)]
    return jnp.pad(a, widths, mode=mode) if more else a
