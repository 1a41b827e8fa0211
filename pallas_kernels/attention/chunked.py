"""Attention in plain XLA whose memory grows linearly with the length.

Short sequences go through a Python loop over blocks of queries, each with the keys that it needs
and no others; long ones, and rows of scores too big to hold, through `streaming`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, BucketBias, LinearBias
from pallas_kernels.attention.dropout import Dropout, factors
from pallas_kernels.attention.mask import Mask, Tile
from pallas_kernels.attention.scores import FORBIDDEN, group_heads, product
from pallas_kernels.attention.streaming import streaming
from pallas_kernels.attention.table import Implementation
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.softcap import softcap_scores

BLOCKS = 16  # of queries; more would be slow to compile
QUERIES = 4096  # at most in blocks: of longer rows the parts of all blocks take much memory
BLOCK_BYTES = 2**28  # of one block's scores
SAVED_BYTES = 2**28  # of all scores: above this the backward pass computes them again


def chunked(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> (
    Float[Array, "batch query heads value_dim"]
    | tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]
):
    """Attention that holds the scores of one block of queries at a time."""
    batch, query_length, heads, _ = q.shape
    row_bytes = 4 * batch * heads * k.shape[1]
    rows = min(block_rows(query_length, mask.window), query_length)
    static = {"scale": scale, "softcap": softcap}
    if query_length > min(rows * BLOCKS, QUERIES) or rows * row_bytes > BLOCK_BYTES:
        output, lse = streaming(q, k, v, mask, bias, dropout, **static)
    else:
        recompute = query_length * row_bytes > SAVED_BYTES
        output, lse = blockwise(
            q, k, v, mask, bias, dropout, **static, rows=rows, recompute=recompute
        )
    return (output, lse) if return_lse else output


IMPLEMENTATION = Implementation("chunked", chunked, lambda request: None, returns_lse=True)


def block_rows(query_length: int, window: int | None) -> int:
    """Queries of a block: small ones waste less at a mask's edges, large ones multiply faster."""
    if query_length <= 512:
        return 64
    if window is not None:
        return 128
    return 256 if query_length <= 2048 else 512


def blockwise(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    rows: int = 128,
    recompute: bool = False,
) -> tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]:
    """A Python loop over blocks of `rows` queries, each with only the keys its rows may see.

    Args:
        recompute: compute a block's weights again in the backward pass instead of keeping them.
    """
    batch, query_length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if isinstance(bias, BucketBias):  # small here, and cheaper to sum once than for every block
        bias = bias.dense(mask.offset, query_length, k.shape[1])
    q, k, v, mask, bias, dropout = vary_alike((q, k, v, mask, bias, dropout))
    grouped = q.reshape(batch, query_length, kv_heads, heads // kv_heads, head_dim)
    grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4))
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    if bias is not None and not isinstance(bias, LinearBias):
        bias = group_heads(bias, kv_heads)
    inputs = grouped, k, v, mask, bias, dropout
    output, lse = _attend((rows, float(scale), softcap, recompute), *inputs)
    output, lse = (jnp.moveaxis(a, 3, 1) for a in (output, lse))
    whole = batch, query_length, heads
    return output.reshape(*whole, v.shape[-1]), lse.reshape(whole)


# The backward pass is written out because it can do with less than autodiff: it never makes the
# normalised weights, dividing the narrow output and gradients by the sums instead, and has from
# (output, gradient) what the derivative of the softmax would sum over all keys once more.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: tuple[int, float, float | None, bool], q, k, v, mask: Mask, bias, dropout):
    return _forward(static, q, k, v, mask, bias, dropout)[0]


def _forward(static, q, k, v, mask: Mask, bias, dropout):
    rows, scale, softcap, recompute = static
    outputs, lses, kept = [], [], []
    for bounds in _blocks(rows, mask, q.shape[3], k.shape[2]):
        weights, inverse, gain, lse = _weights(bounds, scale, softcap, q, k, mask, bias)
        dropped = _dropped(weights, bounds, dropout).astype(v.dtype)
        output = product("bngts,bnsd->bngtd", dropped, _keys(v, bounds))
        outputs.append((output * inverse).astype(q.dtype))
        lses.append(lse)
        kept.append(None if recompute else (weights.astype(v.dtype), inverse, gain))
    output = jnp.concatenate(outputs, axis=3)
    result = output, jnp.concatenate(lses, axis=3)
    return result, (q, k, v, mask, bias, dropout, kept, output)


def _backward(static, saved, cotangents):
    rows, scale, softcap, _ = static
    q, k, v, mask, bias, dropout, kept, output = saved
    d_output, d_lse = cotangents
    exact = jnp.promote_types(jnp.float32, q.dtype)
    expected = jnp.sum(d_output.astype(exact) * output.astype(exact), axis=-1) - d_lse
    expected = expected[..., None]
    d_q, d_k, d_v, d_bias = [], [], [], []
    for bounds, saved_block in zip(_blocks(rows, mask, q.shape[3], k.shape[2]), kept):
        found = saved_block or _weights(bounds, scale, softcap, q, k, mask, bias)[:3]
        weights, inverse, gain = found
        d_rows = (_rows(d_output, bounds) * inverse).astype(v.dtype)
        d_weights = product("bngtd,bnsd->bngts", d_rows, _keys(v, bounds))
        d_weights = _dropped(d_weights, bounds, dropout)
        d_scores = weights * (d_weights - _rows(expected, bounds) * inverse)
        d_bias.append(_bias_gradient(d_scores, bounds, bias))
        if gain is not None:
            d_scores *= gain
        d_scores = (scale * d_scores).astype(q.dtype)
        d_q.append(product("bngts,bnsd->bngtd", d_scores, _keys(k, bounds)).astype(q.dtype))
        before, after = bounds[2], k.shape[2] - bounds[3]
        weights = _dropped(weights, bounds, dropout)
        # Transposed: else XLA would transpose the weights, which are wider than the rows.
        for total, a, b in ((d_k, d_scores, _rows(q, bounds)), (d_v, weights, d_rows)):
            part = product("bngtd,bngts->bnds", b, a.astype(b.dtype))
            total.append(jnp.pad(part, ((0, 0), (0, 0), (0, 0), (before, after))))
    d_bias = None if d_bias[0] is None else sum(d_bias).astype(bias.dtype)
    d_k, d_v = (
        jnp.swapaxes(sum(parts[1:], parts[0]), 2, 3).astype(k.dtype) for parts in (d_k, d_v)
    )
    return jnp.concatenate(d_q, axis=3), d_k, d_v, None, d_bias, None


_attend.defvjp(_forward, _backward)


def _blocks(rows: int, mask: Mask, query_length: int, key_length: int):
    """Of each block: first and end of its queries, first and end of the keys they may see."""
    for start in range(0, query_length, rows):
        stop = min(start + rows, query_length)
        first, end = mask.key_range(start, stop, key_length)
        yield start, stop, min(first, key_length - 1), max(end, 1)  # blind rows reject one key


def _rows(a, bounds):
    return a[:, :, :, bounds[0] : bounds[1]]


def _keys(a, bounds):
    return a[:, :, bounds[2] : bounds[3]]


def _dropped(weights, bounds, dropout: Dropout | None):
    """The weights of a block, or their gradients, after dropout."""
    if dropout is None:
        return weights
    start, stop, first, end = bounds
    seeds = dropout.seeds[:, :, start:stop].reshape(*weights.shape[:3], stop - start)
    return weights * factors(seeds, jnp.arange(first, end), dropout.rate)


def _weights(bounds, scale: float, softcap: float | None, q, k, mask: Mask, bias):
    """exp(score - largest score of the row) of a block, one over each row's sum (blind: 0), the
    derivative of the softcap, and the log of the sum of the row's exponentials (blind: -inf)."""
    start, stop, first, end = bounds
    scores = scale * product("bngtd,bnsd->bngts", _rows(q, bounds), _keys(k, bounds))
    scores, gain = softcap_scores(scores, softcap)
    rows, keys = jnp.arange(start, stop), jnp.arange(first, end)
    if isinstance(bias, LinearBias):
        part = group_heads(bias.tile(mask.offset + rows, keys), scores.shape[1])
        scores += part.astype(scores.dtype)
    elif bias is not None:
        part = _rows(bias, bounds) if bias.shape[3] > 1 else bias
        part = part[..., first:end] if bias.shape[4] > 1 else part
        scores += part.astype(scores.dtype)
    if mask.tile((start, stop), (first, end)) is not Tile.FULL:
        part = mask.mapped(lambda a: a[:, start:stop], lambda a: a[:, first:end])
        allowed = part.allowed(rows, keys)
        scores = jnp.where(allowed[:, None, None], scores, FORBIDDEN)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    inverse, lse = 1.0 / total, top + jnp.log(total)
    if mask.may_have_fully_masked_rows(start, stop, k.shape[2]):
        seen = top > FORBIDDEN / 2
        inverse, lse = jnp.where(seen, inverse, 0.0), jnp.where(seen, lse, -jnp.inf)
    return weights, inverse, gain, lse[..., 0]


def _bias_gradient(d_scores, bounds, bias):
    """Contribution of a block to the gradient of the bias, in the bias's shape."""
    if bias is None or isinstance(bias, LinearBias):
        return None
    start, stop, first, end = bounds
    broadcast = [axis for axis in range(5) if bias.shape[axis] == 1]
    part = jnp.sum(d_scores, axis=broadcast, keepdims=True)
    rows = (start, bias.shape[3] - stop) if bias.shape[3] > 1 else (0, 0)
    keys = (first, bias.shape[4] - end) if bias.shape[4] > 1 else (0, 0)
    return jnp.pad(part, ((0, 0), (0, 0), (0, 0), rows, keys))
