"""Output of attention on TPUs: layouts and operands of the kernel in `forward_kernel`.

A step of the grid has some queries of one head, and the keys and values of that head up to a span
in VMEM. Scores and output are transposed, [keys, queries] and [value, queries]: the running maximum
and sum are rows (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, DistanceBias, LinearBias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.tpu import lowering
from pallas_kernels.attention.tpu.blocks import ForwardBlocks
from pallas_kernels.attention.tpu.forward_kernel import ForwardPlan, kernel
from pallas_kernels.attention.tpu.lowering import Rules, round_up
from pallas_kernels.attention.tpu.parts import SUBLANES
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.pallas import pl, pltpu


def forward(
    rules: Rules,
    blocks: ForwardBlocks,
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]:
    """Output in q's dtype and the log of the sum of exponentials in float32."""
    batch, query_length, heads, _ = q.shape
    queries = round_up(query_length, blocks.query)
    span = blocks.span
    keys = round_up(k.shape[1], span)

    codes, kinds = lowering.tile_codes(
        mask, query_length, k.shape[1], blocks.query, blocks.key, blocks.part
    )
    lists = lowering.tile_lists(codes, span // blocks.key)
    scalars = {name: jnp.asarray(numbers.ravel()) for name, numbers in lists._asdict().items()}
    static_offset = isinstance(mask.offset, int)
    if not static_offset:
        scalars["offset"] = jnp.asarray(mask.offset, jnp.int32).reshape(1)
    if isinstance(bias, LinearBias):
        scalars["slopes"] = lowering.slopes(bias)

    operands = _operands(blocks, q, k, v, mask, bias, dropout, queries, keys)
    plan = ForwardPlan(
        rules,
        blocks,
        kinds,
        keys,
        lists.counts.shape[2],
        queries // blocks.query,
        codes.shape[0] == 1,
        mask.offset if static_offset else None,
        tuple(scalars),
        tuple(operands),
    )
    output, lse = _call(plan, scalars, operands, batch, heads, q.dtype)
    # [batch, heads, parts, value, part] as [batch, query, heads, value].
    output = jnp.transpose(output, (0, 2, 4, 1, 3)).reshape(batch, queries, heads, -1)
    output = output[:, :query_length, :, : v.shape[-1]]
    return output, jnp.swapaxes(lse[:, :, 0, :query_length], 1, 2)


def _operands(blocks: ForwardBlocks, q, k, v, mask, bias, dropout, queries: int, keys: int):
    """The arrays of a call by name, laid out for the kernel."""
    head_dim = round_up(q.shape[-1], 2 * SUBLANES)
    value_dim = round_up(v.shape[-1], 2 * SUBLANES)
    found = {
        "q": lowering.lanes_first(q, queries, head_dim, blocks.part),
        "k": lowering.rows_first(k, keys, head_dim),
        "v": lowering.lanes_first(v, keys, value_dim, blocks.part),
    }
    for name, numbers in lowering.query_numbers(mask, queries).items():
        found["query_" + name] = numbers
    for name, numbers in lowering.key_numbers(mask, keys, blocks.part).items():
        found["key_" + name] = numbers
    if dropout is not None:
        found["query_seeds"] = lowering.pad_to(dropout.seeds, 2, queries)[:, :, None]
    if isinstance(bias, DistanceBias):
        if not isinstance(bias, LinearBias):
            found["differences"] = lowering.by_difference(
                bias, mask.offset, queries, keys, blocks.part
            )
    elif bias is not None:
        found |= lowering.array_bias(bias, queries, keys, blocks.part)
    return found


def _call(plan: ForwardPlan, scalars, operands, batch: int, heads: int, dtype):
    """The kernel on its grid: output [batch, heads, value, query] and sums [.., 1, query]."""
    blocks, strips = plan.blocks, plan.strips
    group = heads // operands["k"].shape[1]
    rows = operands["v"].shape[3]
    queries = strips * blocks.query
    parts = blocks.query // blocks.part
    like = vary_alike([*scalars.values(), *operands.values()])
    varying = jax.typeof(like[0]).manual_axis_type
    output = (batch, heads, strips * parts, rows, blocks.part), dtype
    shapes = [output, ((batch, heads, 1, queries), jnp.float32)]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, heads, strips, plan.walks),
            in_specs=[_spec(plan, name, array, group) for name, array in operands.items()],
            out_specs=[
                pl.BlockSpec(
                    (None, None, parts, rows, blocks.part), lambda b, h, i, s, *_: (b, h, i, 0, 0)
                ),
                pl.BlockSpec((None, None, 1, blocks.query), lambda b, h, i, s, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, blocks.query), jnp.float32),
                pltpu.VMEM((1, blocks.query), jnp.float32),
                pltpu.VMEM((SUBLANES, blocks.query), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in shapes
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        interpret=plan.rules.interpret,
        name="attention_forward",
    )(*like)


def _spec(plan: ForwardPlan, name: str, array, group: int) -> pl.BlockSpec:
    """Block of an operand: its axes of size 1 are shared, keys by `group` heads."""
    blocks = plan.blocks
    of_batch, of_head = array.shape[0] > 1, array.ndim > 3 and array.shape[1] > 1
    if name == "differences":
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, h, i, s, *_: (h, 0, 0))
    block: tuple[Any, ...]
    if name == "q":
        block, at = (blocks.query // blocks.part, *array.shape[3:]), lambda i, s: (i, 0, 0)
    elif name == "v":
        block, at = (blocks.span // blocks.part, *array.shape[3:]), lambda i, s: (s, 0, 0)
    elif name.startswith("query_"):
        block, at = (array.shape[-2], blocks.query), lambda i, s: (0, i)
    elif name == "k":
        block, at = (blocks.span, array.shape[-1]), lambda i, s: (s, 0)
    elif name == "bias":
        block, at = (blocks.span, blocks.query), lambda i, s: (s, i)
    else:
        block, at = (blocks.span // blocks.part, blocks.part), lambda i, s: (s, 0)

    def span(b, i, s, prefetched):
        table = prefetched[plan.scalars.index("spans")]
        return table[plan.walk(b, i, s)] if plan.keys > blocks.span else 0

    def index(b, h, i, s, *prefetched):
        row = b if of_batch else 0
        head = (jax.lax.div(h, group) if name in ("k", "v") else h) if of_head else 0
        lead = (row, head) if array.ndim > 3 else (row,)
        return (*lead, *at(i, span(b, i, s, prefetched)))

    return pl.BlockSpec((*(None,) * (array.ndim - len(block)), *block), index)
