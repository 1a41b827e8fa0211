"""Gradients of attention on TPUs: layouts and operands of the kernel in `backward_kernel`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, BucketBias, DistanceBias, LinearBias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.tpu import lowering
from pallas_kernels.attention.tpu.backward_blocks import BackwardBlocks
from pallas_kernels.attention.tpu.backward_kernel import Walk, kernel
from pallas_kernels.attention.tpu.lowering import LOG2E, Rules, round_up

HEAD = 64  # heads are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An array in HBM, and which part of it a step has; index maps take the axes of the grid."""

    array: Any
    block: tuple[int | None, ...] | None
    index: Callable[..., tuple] | None
    space: Any = None

    @property
    def spec(self) -> pl.BlockSpec:
        if self.block is None:
            return pl.BlockSpec(memory_space=self.space)
        more = {} if self.space is None else {"memory_space": self.space}
        return pl.BlockSpec(self.block, self.index, **more)


def gradients(
    rules: Rules,
    blocks: BackwardBlocks,
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None,
    dropout: Dropout | None,
    output: Float[Array, "batch query heads value_dim"],
    lse: Float[Array, "batch query heads"],
    d_output: Float[Array, "batch query heads value_dim"],
    d_lse: Float[Array, "batch query heads"],
) -> tuple[
    Float[Array, "batch query heads head_dim"],
    Float[Array, "batch key kv_heads head_dim"],
    Float[Array, "batch key kv_heads value_dim"],
    Any,
]:
    """Gradients of q, k, v and of the bias: of its array, of the table, or None where it has none.

    Dao et al. 2022 (arXiv:2205.14135), algorithm 4: with p the weights, made again from scores and
    log-sum-exp, the gradient of the scores is p (d_output v - sum(d_output output) + d_lse).

    Args:
        blocks: fitted to the call.
        output, lse: what the forward pass returned.
    """
    walk, codes = plan(rules, mask, bias, blocks)
    queries = round_up(rules.query_length, walk.blocks.query)
    saved = output, lse, d_output, d_lse
    ins = _operands(walk, codes, queries, (q, k, v), mask, bias, dropout, saved)
    heads = q.shape[2], k.shape[2] * blocks.shares
    dims = [ins[name].array.shape[-1] for name in "qv"]
    outs = _results(walk, queries, q, heads, dims)
    grid = q.shape[0], heads[1], walk.spans, heads[0] // heads[1], queries // blocks.query
    found = _call(walk, grid, ins, outs, _scratch(walk, q.dtype, dims))
    for name in ("d_k", "d_v"):
        shares = found[name].reshape(q.shape[0], k.shape[2], blocks.shares, *found[name].shape[2:])
        found[name] = jnp.sum(shares, axis=2) if blocks.shares > 1 else found[name]
    d_q, d_k, d_v = (
        jnp.swapaxes(found[name], 1, 2)[:, : a.shape[1], :, : a.shape[3]].astype(a.dtype)
        for name, a in (("d_q", q), ("d_k", k), ("d_v", v))
    )
    return d_q, d_k, d_v, _bias_gradient(walk, bias, mask, found.get("d_bias"))


def _call(walk: Walk, grid: tuple[int, ...], ins, outs, scratch) -> dict[str, jax.Array]:
    """Runs the kernel; its outputs by name."""
    call = pl.pallas_call(
        functools.partial(kernel, walk, (*ins, *outs, *scratch)),
        grid=grid,
        in_specs=[operand.spec for operand in ins.values()],
        out_specs=[operand.spec for operand in outs.values()],
        out_shape=[operand.array for operand in outs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *["arbitrary"] * 3),
            vmem_limit_bytes=walk.blocks.memory * 2**20,
        ),
        interpret=walk.rules.interpret,
        name="attention_backward",
    )
    if walk.spans > 1:  # `vmap` cannot cut an output that the kernel copies to by itself
        call = jax.custom_batching.sequential_vmap(call)
    return dict(zip(outs, call(*(operand.array for operand in ins.values())), strict=True))


def plan(
    rules: Rules, mask: Mask, bias: Bias | None, blocks: BackwardBlocks
) -> tuple[Walk, Array | np.ndarray]:
    """The walk of a call, and codes [#batch, query_blocks, spans, 1, tiles + 1] of its tiles, of
    which the last one is the number of those that are not empty."""
    tiles = blocks.span // blocks.key
    spans = -(-rules.key_length // blocks.span)
    sizes = rules.query_length, rules.key_length, blocks.query, blocks.key
    codes, kinds = lowering.tile_codes(mask, *sizes, blocks.part)
    xp = np if isinstance(codes, np.ndarray) else jnp
    codes = xp.pad(codes, ((0, 0), (0, 0), (0, spans * tiles - codes.shape[2])))
    codes = codes.reshape(*codes.shape[:2], spans, 1, tiles)
    codes = xp.concatenate([codes, (codes != 0).sum(-1, keepdims=True).astype(np.int32)], axis=-1)
    walk = Walk(
        rules,
        blocks,
        kinds,
        spans,
        offset=mask.offset if isinstance(mask.offset, int) else None,
        bias=_form(bias),
        ends=spans * blocks.span != rules.key_length,
    )
    return walk, codes


def _form(bias: Bias | None) -> str:
    """The name that a walk gives a bias."""
    if bias is None:
        return ""
    if isinstance(bias, DistanceBias):
        return "linear" if isinstance(bias, LinearBias) else "distance"
    queries, keys = (size > 1 for size in bias.shape[2:])
    return {(True, True): "pairs", (False, True): "keys", (True, False): "queries"}.get(
        (queries, keys), "heads"
    )


def _operands(walk, codes, queries: int, qkv, mask, bias, dropout, saved) -> dict[str, _Operand]:
    """The inputs of the kernel by name."""
    q, k, v = qkv
    output, lse, d_output, d_lse = saved
    shares, keys = walk.blocks.shares, walk.spans * walk.blocks.span
    groups = q.shape[2] // (k.shape[2] * shares)
    head_dim, value_dim = (round_up(a.shape[3], HEAD) for a in (q, v))

    def of_queries(b, n, s, g, i):
        return b, n * groups + g, i, 0

    def of_keys(b, n, s, g, i):
        return b, n if shares == 1 else jax.lax.div(n, shares), s, 0

    def rows_of_queries(b, n, s, g, i):
        return b, n * groups + g, 0, i

    size, span = walk.blocks.query, walk.blocks.span
    rows = _statistics(output, lse, d_output, d_lse, queries)
    first = lowering.rows_first
    found = {
        "q": _Operand(first(q, queries, head_dim), (None, None, size, head_dim), of_queries),
        "d_output": _Operand(
            first(d_output.astype(q.dtype), queries, value_dim),
            (None, None, size, value_dim),
            of_queries,
        ),
        "rows": _Operand(rows, (None, None, 2, size), rows_of_queries),
        "k": _Operand(first(k, keys, head_dim), (None, None, span, head_dim), of_keys),
        "v": _Operand(first(v, keys, value_dim), (None, None, span, value_dim), of_keys),
        "codes": _Operand(
            jnp.asarray(codes),
            (None, None, None, 1, walk.tiles + 1),
            _whole(lambda b, n, s, g, i: (b, i, s, 0, 0), codes.shape),
            pltpu.SMEM,
        ),
    }
    if dropout is not None:
        seeds = lowering.pad_to(dropout.seeds, 2, queries)[:, :, None]
        found["seeds"] = _Operand(seeds, (None, None, 1, size), rows_of_queries)
    if bias is not None:
        name = "slopes" if walk.bias == "linear" else "bias"
        found[name] = _bias_operand(walk, bias, mask, queries, keys, groups)
    return found | _mask_operands(walk, mask, queries, keys)


def _mask_operands(walk: Walk, mask: Mask, queries: int, keys: int) -> dict[str, _Operand]:
    """The inputs of the kernel by name that belong to the mask, without the codes of tiles."""
    blocks, found = walk.blocks, {}
    if walk.offset is None:
        offset = jnp.asarray(mask.offset, jnp.int32).reshape(1)
        found["offset"] = _Operand(offset, None, None, pltpu.SMEM)
    for what, numbers in lowering.query_numbers(mask, queries).items():
        index = _whole(lambda b, n, s, g, i: (b, 0, i), numbers.shape)
        found[f"query_{what}"] = _Operand(numbers, (None, 1, blocks.query), index)
    for what, numbers in lowering.key_numbers(mask, keys, blocks.part).items():
        numbers = numbers.reshape(numbers.shape[0], walk.spans, -1, blocks.part)
        index = _whole(lambda b, n, s, g, i: (b, s, 0, 0), numbers.shape)
        block = (None, None, *numbers.shape[2:])
        found[f"key_{what}"] = _Operand(numbers, block, index)
    return found


def _whole(index: Callable[..., tuple], shape: tuple[int, ...]) -> Callable[..., tuple]:
    """An index map that stays at 0 along axes of size 1."""

    def map_(*at):
        return tuple(0 if size == 1 else a for a, size in zip(index(*at), shape, strict=True))

    return map_


def _statistics(output, lse, d_output, d_lse, queries: int) -> Float[Array, "batch heads 2 query"]:
    """Of each query its log-sum-exp in base 2, and what the gradients of its weights lose."""
    blind = lse == -jnp.inf
    lost = jnp.sum(output.astype(jnp.float32) * d_output.astype(jnp.float32), axis=-1) - d_lse
    # No weight of a blind row, or of one of padding, is more than zero.
    lse = jnp.where(blind, jnp.inf, lse * LOG2E)
    lse = lowering.pad_to(jnp.swapaxes(lse, 1, 2), 2, queries, jnp.inf)
    lost = lowering.pad_to(jnp.swapaxes(jnp.where(blind, 0.0, lost), 1, 2), 2, queries)
    return jnp.stack([lse, lost], axis=2).astype(jnp.float32)


def _bias_operand(walk: Walk, bias, mask: Mask, queries: int, keys: int, groups: int) -> _Operand:
    """The numbers of a bias."""
    if walk.bias == "linear":
        return _Operand(lowering.slopes(bias), None, None, pltpu.SMEM)
    if walk.bias == "distance":
        numbers = lowering.by_difference(bias, mask.offset, queries, keys, walk.blocks.part)
        block = (None, *numbers.shape[1:])
        return _Operand(numbers, block, lambda b, n, s, g, i: (n * groups + g, 0, 0))
    size, span, part = walk.blocks.query, walk.blocks.span, walk.blocks.part
    (numbers,) = lowering.array_bias(bias, queries, keys, part).values()
    if walk.bias == "keys":
        numbers = numbers.reshape(*numbers.shape[:2], walk.spans, -1, part)
        block = (None, None, None, span // part, part)
        index = lambda b, n, s, g, i: (b, n * groups + g, s, 0, 0)  # noqa: E731
    else:
        block = (None, None, span if walk.bias == "pairs" else 1, size)
        index = lambda b, n, s, g, i: (b, n * groups + g, s, i)  # noqa: E731
    return _Operand(numbers, block, _whole(index, numbers.shape))


def _results(walk: Walk, queries: int, q, heads, dims) -> dict[str, _Operand]:
    """The outputs of the kernel by name."""
    batch, groups = q.shape[0], heads[0] // heads[1]
    keys, size, span = walk.spans * walk.blocks.span, walk.blocks.query, walk.blocks.span

    def of_keys(b, n, s, g, i):
        return b, n, s, 0

    def typed(*shape, dtype=q.dtype):
        axes = jax.typeof(q).manual_axis_type
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)

    found = {}
    if walk.spans == 1:
        array = typed(batch, heads[0], queries, dims[0])
        index = lambda b, n, s, g, i: (b, n * groups + g, i, 0)  # noqa: E731
        found["d_q"] = _Operand(array, (None, None, size, dims[0]), index)
    else:
        array = typed(batch, heads[0], queries, dims[0], dtype=jnp.float32)
        found["d_q"] = _Operand(array, None, None, pl.ANY)
    for name, dim in zip(("d_k", "d_v"), dims):
        dtype = q.dtype if walk.blocks.shares == 1 else jnp.float32
        array = typed(batch, heads[1], keys, dim, dtype=dtype)
        found[name] = _Operand(array, (None, None, span, dim), of_keys)
    shapes = {
        "pairs": ((keys, queries), (span, size), lambda s, i: (s, i)),
        "keys": ((keys, walk.blocks.part), (span, walk.blocks.part), lambda s, i: (s, 0)),
        "queries": ((walk.spans, 8, queries), (None, 8, size), lambda s, i: (s, 0, i)),
        "distance": (
            (walk.spans, 8, queries + span),
            (None, 8, queries + span),
            lambda s, i: (s, 0, 0),
        ),
    }
    shapes["heads"] = shapes["queries"]
    if walk.bias in shapes:
        shape, block, index = shapes[walk.bias]
        found["d_bias"] = _Operand(
            typed(batch, heads[0], *shape, dtype=jnp.float32),
            (None, None, *block),
            lambda b, n, s, g, i: (b, n * groups + g, *index(s, i)),
        )
    return found


def _scratch(walk: Walk, dtype, dims) -> dict[str, Any]:
    """The memory of the kernel by name."""
    size, span = walk.blocks.query, walk.blocks.span
    queries = (dims[0], size) if walk.blocks.transposed else (size, dims[0])
    found = {"d_queries": pltpu.VMEM(queries, jnp.float32)}
    if walk.blocks.shares == 1:
        found["d_keys"] = pltpu.VMEM((span, dims[0]), jnp.float32)
        found["d_values"] = pltpu.VMEM((span, dims[1]), jnp.float32)
    if walk.blocks.transposed:
        found["keys_across"] = pltpu.VMEM((dims[0], span), dtype)
    if walk.spans > 1:
        found |= {
            "sums": pltpu.VMEM((size, dims[0]), jnp.float32),
            "arrived": pltpu.SemaphoreType.DMA,
            "left": pltpu.SemaphoreType.DMA,
            "under_way": pltpu.SMEM((1,), jnp.int32),
        }
    return found


def _bias_gradient(walk: Walk, bias, mask: Mask, found):
    """The gradient of a bias from the sums of the kernel."""
    if found is None:
        return None
    if walk.bias == "distance":
        return _table_gradient(walk, bias, mask, jnp.sum(found, axis=0))
    if walk.bias == "keys":
        found = jnp.sum(found, axis=-1)[:, :, None]
    elif walk.bias == "pairs":
        found = jnp.swapaxes(found, 2, 3)
    else:
        found = jnp.sum(found, axis=(2, 3))[..., None]
    found = found[:, :, : walk.rules.query_length, : walk.rules.key_length]
    axes = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    return jnp.sum(found, axis=axes, keepdims=True).astype(bias.dtype)


def _table_gradient(walk: Walk, bias: BucketBias, mask: Mask, found):
    """The gradient of a table from sums [heads, spans, 8, differences], row r being r late."""
    heads, spans, rows, length = found.shape
    late = [found[:, :, r, r : length - rows + 1 + r] for r in range(rows)]
    by_difference = sum(late[1:], late[0])
    keys = spans * walk.blocks.span
    total = jnp.zeros((heads, keys + length - walk.blocks.span), jnp.float32)
    for span in range(spans):
        first = keys - (span + 1) * walk.blocks.span
        total = total.at[:, first : first + by_difference.shape[-1]].add(by_difference[:, span])
    difference = jnp.arange(total.shape[1]) - keys

    def numbers(table):
        return dataclasses.replace(bias, table=table).at(-difference - mask.offset)

    return jax.vjp(numbers, bias.table)[1](total)[0]
