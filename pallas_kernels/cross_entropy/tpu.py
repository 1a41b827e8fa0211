"""Cross-entropy on TPU by kernels that hold no logits, forward or backward.

The forward pass is one product. The backward pass makes the logits again and both gradients from
them, in one kernel of three products, or where its accumulators do not fit (see `tpu_blocks`) in
two kernels of two products each. Sums are in float32 and always in the same order.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import KINDS
from pallas_kernels.cross_entropy import tpu_kernels as kernels
from pallas_kernels.cross_entropy.tpu_blocks import LANES, LogitBlocks, LogitTile, blocks, round_up
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.pallas import pl, pltpu
from pallas_kernels.target import target

LN2 = math.log(2)


class _Static(NamedTuple):
    request: kernels.LogitRequest
    blocks: LogitBlocks
    interpret: Any


def refusal(hidden, head, largest: bool = False) -> str | None:
    """Reason why the kernels cannot serve, or None if they can."""
    device = target()
    if device.platform != "tpu":
        return f"it needs a TPU and the device is a {device.platform}"
    if device.kind not in KINDS:
        return f"a {device.kind}, it knows {', '.join(KINDS)}"
    if hidden.dtype != head.dtype or hidden.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {hidden.dtype} and {head.dtype}, it takes two of bfloat16 or of float32"
    embed = round_up(hidden.shape[-1])
    # The smallest blocks, so that shares of a mesh are served if any are.
    if blocks(device.kind, LANES, LANES, embed, hidden.dtype.itemsize) is None:
        return f"hidden of width {embed}: its blocks do not fit the vector memory"
    return None


def vocabulary_terms(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "rows embed"],
    targets: Int[Array, "batch seq"],
    *,
    words: int | Int[Array, ""],
    scale: float,
    softcap: float | None = None,
    largest: bool = False,
    mean: bool = False,
    chunk: None = None,
) -> tuple[Float[Array, "batch seq"], ...]:
    """Contribution of a head's rows to the loss of each token, as `chunked.vocabulary_terms`.

    The gradient of the largest logit goes to the first row that has it.
    """
    words = jnp.minimum(jnp.asarray(words, jnp.int32), head.shape[0])
    hidden, head, targets, words = vary_alike((hidden, head, targets, words))
    shape, embed = targets.shape, round_up(hidden.shape[-1])
    tokens, rows = targets.size, head.shape[0]
    device = target()
    tiles = blocks(device.kind, tokens, rows, embed, hidden.dtype.itemsize)
    assert tiles is not None, "refused above"
    # All tiles of tokens divide the largest.
    padded = round_up(tokens, math.lcm(*(tile.tokens for tile in tiles[:4] if tile is not None)))
    hidden = _pad(hidden.reshape(tokens, -1), padded, embed)
    head = _pad(head, round_up(rows), embed)
    # LogitBlocks have rows that the head has not: a target there is of another shard.
    targets = jnp.where(targets < words, targets, -1).reshape(1, tokens)
    targets = jnp.pad(targets, ((0, 0), (0, padded - tokens)), constant_values=-1)
    request = kernels.LogitRequest(scale, softcap, largest, mean, head.shape[0])
    static = _Static(request, tiles, device.interpret)
    terms = _terms(static, hidden, head, targets, words.reshape(1))
    return tuple(term[0, :tokens].reshape(shape) for term in terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _terms(static: _Static, hidden, head, targets, words):
    return _forward(static, hidden, head, targets, words)[0]


def _forward(static: _Static, hidden, head, targets, words):
    request, tile = static.request, static.blocks.forward
    count, tokens = 3 + request.mean, hidden.shape[0]
    grid = tokens // tile.tokens, pl.cdiv(head.shape[0], tile.rows)
    of_tokens = functools.partial(pl.BlockSpec, index_map=lambda part, block, _: (0, part))
    sums, best = _call(
        functools.partial(kernels.forward_body, request),
        static,
        "forward",
        grid,
        [
            pl.BlockSpec((tile.rows, head.shape[1]), lambda part, block, _: (block, 0)),
            pl.BlockSpec((tile.tokens, head.shape[1]), lambda part, block, _: (part, 0)),
            of_tokens((1, tile.tokens)),
        ],
        [of_tokens((count, tile.tokens)), of_tokens((1, tile.tokens))],
        [_like(hidden, (count, tokens), jnp.float32), _like(hidden, (1, tokens), jnp.int32)],
        [
            pltpu.VMEM((count, kernels.SUBLANES, tile.tokens), jnp.float32),
            pltpu.VMEM((kernels.SUBLANES, tile.tokens), jnp.int32),
        ],
        ("parallel", "arbitrary"),
        products=1,
    )(words, head, hidden, targets)
    # Where no row is a word the sum is 0, and the largest logit stays as small as can be.
    top, total = sums[0:1], jnp.where(sums[1:2] == 0, 1.0, sums[1:2])
    log_part = top + jnp.log2(total)
    terms = [log_part, sums[2:3]]
    if request.largest:
        terms.append(top)
    if request.mean:
        terms.append(sums[3:4] / total)
    saved = hidden, head, targets, words, best, log_part, terms[-1]
    return tuple(LN2 * term for term in terms), saved


def _backward(static: _Static, saved, d_terms):
    hidden, head, targets, words, best, log_part, mean = saved
    request, tiles = static.request, static.blocks
    d_log_part, d_label, *more = d_terms
    zeros = jnp.zeros_like(log_part)
    d_largest = more[0] if request.largest else zeros
    d_mean = more[-1] if request.mean else zeros
    share = d_log_part + d_mean * (1 - LN2 * mean) if request.mean else d_log_part
    scaled = [request.scale * d for d in (share, d_label, LN2 * d_mean, d_largest)]
    factors = jnp.concatenate([log_part, *scaled])
    ids = jnp.concatenate([targets, best])
    arrays = words, head, hidden, ids, factors
    if tiles.fused is not None:
        d_head, d_hidden = _fused(static, tiles.fused, *arrays)
        d_hidden = jnp.sum(d_hidden, axis=0).astype(hidden.dtype)
    else:
        d_head = _one(static, tiles.d_head, *arrays, of_head=True)
        d_hidden = _one(static, tiles.d_hidden, *arrays, of_head=False)
    return d_hidden, d_head, None, None


_terms.defvjp(_forward, _backward)


def _fused(static: _Static, tile: LogitTile, words, head, hidden, ids, factors):
    """Gradients of the head, and of hidden from the blocks of rows of each core."""
    tokens, embed = hidden.shape
    count = pl.cdiv(head.shape[0], tile.rows)
    cores = min(static.blocks.cores, count)
    each = pl.cdiv(count, cores)

    def rows(core, block, part, _):
        return jnp.minimum(core * each + block, count - 1), 0

    of_rows = pl.BlockSpec((tile.rows, embed), rows)
    return _call(
        functools.partial(kernels.fused_body, static.request),
        static,
        "gradients",
        (cores, each, tokens // tile.tokens),
        [
            of_rows,
            pl.BlockSpec((tile.tokens, embed), lambda core, block, part, _: (part, 0)),
            pl.BlockSpec((2, tile.tokens), lambda core, block, part, _: (0, part)),
            pl.BlockSpec((5, tile.tokens), lambda core, block, part, _: (0, part)),
        ],
        [of_rows, pl.BlockSpec(memory_space=pl.ANY)],
        [_like(head, head.shape, head.dtype), _like(head, (cores, tokens, embed), jnp.float32)],
        [
            pltpu.VMEM((tile.rows, embed), jnp.float32),
            pltpu.VMEM((3, tile.tokens, embed), jnp.float32),
            pltpu.SemaphoreType.DMA((3,)),
            pltpu.SemaphoreType.DMA((3,)),
        ],
        ("parallel", "arbitrary", "arbitrary"),
        products=3,
    )(words, head, hidden, ids, factors)


def _one(static: _Static, tile: LogitTile, words, head, hidden, ids, factors, *, of_head: bool):
    """Gradient of the head or of hidden."""
    grid = pl.cdiv(head.shape[0], tile.rows), hidden.shape[0] // tile.tokens
    # The array that the gradient is of is the outer loop.
    rows, part = (0, 1) if of_head else (1, 0)
    of_rows = pl.BlockSpec((tile.rows, head.shape[1]), lambda *at: (at[rows], 0))
    of_tokens = pl.BlockSpec((tile.tokens, head.shape[1]), lambda *at: (at[part], 0))
    array, out = (head, of_rows) if of_head else (hidden, of_tokens)
    body = kernels.d_head_body if of_head else kernels.d_hidden_body
    return _call(
        functools.partial(body, static.request),
        static,
        "d_head" if of_head else "d_hidden",
        grid if of_head else grid[::-1],
        [
            of_rows,
            of_tokens,
            pl.BlockSpec((2, tile.tokens), lambda *at: (0, at[part])),
            pl.BlockSpec((5, tile.tokens), lambda *at: (0, at[part])),
        ],
        out,
        _like(array, array.shape, array.dtype),
        [pltpu.VMEM(out.block_shape, jnp.float32)],
        ("parallel", "arbitrary"),
        products=2,
    )(words, head, hidden, ids, factors)


def _call(body, static: _Static, name, grid, inputs, outs, shapes, scratch, semantics, products):
    """`pl.pallas_call` with the number of words as a scalar."""

    def run(words, head, hidden, *rest):
        pairs = head.shape[0] * hidden.shape[0]
        arrays = (head, hidden, *rest, *jax.tree.leaves(shapes))
        return pl.pallas_call(
            body,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=inputs,
                out_specs=outs,
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=static.blocks.vmem
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * head.shape[1],
                transcendentals=pairs,
                bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
            ),
            interpret=static.interpret,
            name=f"cross_entropy_{name}",
        )(words, head, hidden, *rest)

    return run


def _like(array, shape, dtype) -> jax.ShapeDtypeStruct:
    """Type of an array that varies over the same manual mesh axes."""
    axes = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def _pad(array, *shape: int):
    """The array with zeros after its ends."""
    more = [(0, new - old) for new, old in zip(shape, array.shape)]
    return jnp.pad(array, more) if any(after for _, after in more) else array
