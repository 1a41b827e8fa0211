"""Decode attention on TPUs by a Pallas kernel that reads the cache in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.api import merge
from pallas_kernels.attention.bias import BucketBias, DistanceBias, LinearBias, bucket
from pallas_kernels.decode_attention.cache import CacheRows, KeyValueCache, PagedCache
from pallas_kernels.decode_attention.kernel import Refs, Shape, decode_kernel
from pallas_kernels.decode_attention.plan import (
    LANES,
    QueryLayout,
    followers,
    pages_of_a_step,
    spans,
)
from pallas_kernels.decode_attention.request import DecodeRequest
from pallas_kernels.manual_axes import vary_alike, varying_axes
from pallas_kernels.pallas import pl, pltpu
from pallas_kernels.table import Implementation
from pallas_kernels.target import target

# Keys and values of a step, in bytes: some 2.5 microseconds of a core's share of the memory.
STEP_BYTES = {"TPU v5": 2**22, "TPU v5p": 2**22, "TPU v6 lite": 2**22}
SCORES = 2**18  # of a step at most: they are kept in VMEM
MOST_NEW = 16
NO_INT8 = ("TPU v4",)  # chips whose matrix unit does not take it
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # chips whose cores share a program


def tpu(
    q: Float[Array, "batch new heads head_dim"],
    cache: KeyValueCache,
    first: Int[Array, "batch"],
    bias: DistanceBias | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Float[Array, "batch new heads value_dim"], Float[Array, "batch new heads"]]:
    """Serves a request that `refusal` does not refuse."""
    request = DecodeRequest(q, cache, first, bias, scale, softcap, window)
    shape = shape_of(request)
    q, cache, first, bias = vary_alike((q, cache, first, bias))
    splits = 2 if target().kind in TWO_CORES else 1
    output, lse = _call(shape, splits, q, cache, first, bias)
    layout = shape.layout
    if splits > 1:
        parts = [
            (layout.collect(o), layout.collect_numbers(s[..., 0])) for o, s in zip(output, lse)
        ]
        output, lse = merge(parts)
        return output.astype(q.dtype), lse
    return layout.collect(output[0]).astype(q.dtype), layout.collect_numbers(lse[0, ..., 0])


def shape_of(request: DecodeRequest) -> Shape:
    """The numbers that the kernel of a request is compiled for."""
    q, cache = request.q, request.cache
    batch, new, heads, head_dim = q.shape
    layout = QueryLayout(
        request.kv_heads, heads // request.kv_heads, new, head_dim, request.value_dim
    )
    paged = isinstance(cache, PagedCache)
    token_bytes = sum(a.shape[-1] * a.dtype.itemsize for a in (cache.keys, cache.values))
    page = cache.keys.shape[-2] if paged else chunk(cache)
    return Shape(
        layout,
        page=page,
        pages=min(
            pages_of_a_step(
                page,
                token_bytes,
                STEP_BYTES.get(target().kind, 2**21),
                SCORES // (layout.groups * layout.rows),
            ),
            cache.tokens // page,
        ),
        table_width=cache.page_table.shape[1] if paged else 0,
        slots=cache.tokens,
        batch=batch,
        scale=request.scale,
        softcap=request.softcap,
        window=request.window,
        quantized=cache.key_scales is not None,
        ring=not paged and request.window is not None,
        bias={LinearBias: "linear", BucketBias: "buckets"}.get(type(request.bias)),
        dtype=q.dtype,
        integer=cache.keys.dtype == jnp.int8
        and q.dtype == jnp.bfloat16
        and target().kind not in NO_INT8,
    )


def chunk(cache: CacheRows) -> int:
    """Slots of a row that are copied together: as a page. Of int8 more, which has four copies."""
    sizes = (256, 128) if cache.keys.dtype == jnp.int8 else (128, 64, 32, 16, 8)
    return next((size for size in sizes if cache.tokens % size == 0), 0)


def _call(shape: Shape, splits: int, q, cache, first, bias):
    layout, batch = shape.layout, shape.batch
    scalars = scalars_of(shape, splits, cache, first)
    arrays = [a.reshape(-1, shape.page, a.shape[-1]) for a in (cache.keys, cache.values)]
    if shape.quantized:
        arrays += [
            a.astype(jnp.float32).reshape(-1, *a.shape[-2:])
            for a in (cache.key_scales, cache.value_scales)
        ]
    queries = [layout.spread(q)]
    if shape.integer:
        queries = in_two_parts(shape, queries[0])
    more, more_specs = bias_inputs(shape, bias)
    rows = layout.groups * layout.rows
    out = [(1, 1, rows, lanes) for lanes in (layout.members * layout.value_dim, LANES)]
    typed = {}
    if varying_axes(queries):
        typed["manual_axis_type"] = jax.typeof(queries[0]).manual_axis_type
    sizes = [(2, shape.pages, shape.page, a.shape[-1]) for a in arrays[:2]]
    sizes += [(2, layout.kv_heads, shape.tokens) for _ in arrays[2:]]
    return pl.pallas_call(
        functools.partial(_body, shape, len(queries), len(more), len(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(splits, batch),
            in_specs=[
                *(pl.BlockSpec((1, *a.shape[1:]), lambda s, b, *_: (b, 0, 0)) for a in queries),
                *more_specs,
                *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in arrays),
            ],
            out_specs=[pl.BlockSpec(size, lambda s, b, *_: (s, b, 0, 0)) for size in out],
            scratch_shapes=[
                *(pltpu.VMEM(size, a.dtype) for size, a in zip(sizes, arrays)),
                pltpu.SemaphoreType.DMA((2, len(arrays))),
                pltpu.SMEM((1,), jnp.int32),
                *(pltpu.VMEM(size[2:], jnp.float32) for size in (out[1], out[1], out[0])),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((splits, batch, *size[2:]), jnp.float32, **typed) for size in out
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True
        ),
        interpret=target().interpret,
        name="decode_attention",
    )(*scalars, *queries, *more, *arrays)


def scalars_of(shape: Shape, splits: int, cache, first) -> list[jax.Array]:
    """Numbers that the kernel has in scalar memory; see `Refs`."""
    batch = shape.batch
    lengths = jnp.clip(cache.lengths, 0, None if shape.ring else shape.slots)
    begin, end = spans(
        lengths, first, shape.layout.new, shape.slots, shape.page, shape.window, splits, shape.ring
    )
    if shape.table_width:
        table = jnp.clip(cache.page_table, 0, cache.keys.shape[0] - 1).reshape(-1)
    else:
        layer = 0 if cache.layer is None else cache.layer
        table = (layer * batch + jnp.arange(batch)) * (shape.slots // shape.page)
    scalars = [begin, end, followers(begin, end), table, lengths, first]
    return [a.reshape(-1).astype(jnp.int32) for a in scalars]


def _body(shape: Shape, queries: int, extra: int, arrays: int, *refs) -> None:
    """Names the references of a call."""
    rest = list(refs)

    def take(count: int) -> list:
        return [rest.pop(0) for _ in range(count)]

    named = [*take(6), *[*take(queries), None][:2], *[*take(extra), None, None][:2]]
    named += [tuple(take(arrays)), *take(2), tuple(take(arrays))]
    decode_kernel(shape, Refs(*named, *rest))


def in_two_parts(shape: Shape, rows: Float[Array, "batch all_rows lanes"]) -> list[jax.Array]:
    """Rows of queries as int8, 256 times the first part of a group plus the second, and scales."""
    layout = shape.layout
    rows = rows.astype(jnp.float32).reshape(-1, layout.groups, layout.rows, rows.shape[-1])
    largest = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
    # A NaN that the maximum lost comes back by the sum.
    largest += 0 * jnp.sum(rows, axis=-1, keepdims=True)
    steps = jnp.round(rows * (256 * 127 / jnp.where(largest > 0, largest, 1.0))).astype(jnp.int32)
    high = (steps + 128) >> 8
    parts = [
        jnp.pad(part, ((0, 0), (0, 0), (0, shape.half - layout.rows), (0, 0)))
        for part in (high, steps - 256 * high)
    ]
    parts = jnp.concatenate(parts, axis=2).astype(jnp.int8)
    scales = jnp.broadcast_to(largest / (256 * 127), (*rows.shape[:3], LANES))
    return [a.reshape(a.shape[0], -1, a.shape[-1]) for a in (parts, scales)]


def bias_inputs(shape: Shape, bias: DistanceBias | None):
    """Arrays that the kernel makes a bias of, and their specs."""
    if bias is None:
        return [], []
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    if isinstance(bias, LinearBias):
        rows = shape.layout.by_row(jnp.asarray(bias.slopes, jnp.float32)[:, None])
        return [jnp.broadcast_to(rows, (rows.shape[0], LANES))], [whole]
    table = shape.layout.by_row(bias.table.astype(jnp.float32))
    count = table.shape[1]
    table = jnp.pad(table, ((0, 0), (0, -count % LANES)))
    far = jnp.arange(bias.max_distance + 1)
    buckets = bucket(-far, count, bias.max_distance, bias.causal)
    limits = jnp.sum(buckets[None, :] < jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)
    return [table, limits], [whole, pl.BlockSpec(memory_space=pltpu.SMEM)]


def refusal(request: DecodeRequest) -> str | None:
    """Reason why the kernel cannot serve, or None if it can."""
    if (platform := target().platform) != "tpu":
        return f"it needs a TPU and the device is a {platform}"
    q, cache = request.q, request.cache
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q.dtype} of the queries, it takes bfloat16 and float32"
    held = cache.keys.dtype
    if held != cache.values.dtype or held not in (jnp.bfloat16, jnp.float32, jnp.int8):
        return (
            f"a cache in {held} and {cache.values.dtype}, it takes bfloat16, float32 and int8,"
            " the same for keys and values"
        )
    if q.shape[1] > MOST_NEW:
        return (
            f"{q.shape[1]} new tokens a row, it takes up to {MOST_NEW}: a prompt is for attention"
        )
    if request.bias is not None and type(request.bias) not in (LinearBias, BucketBias):
        return f"a bias of {type(request.bias).__name__}, it takes LinearBias and BucketBias"
    return refused_slots(cache)


def refused_slots(cache: KeyValueCache) -> str | None:
    """Reason why slots of a cache cannot be copied, or None."""
    int8 = cache.keys.dtype == jnp.int8
    least = 128 if int8 else 32 // cache.keys.dtype.itemsize
    slots = cache.keys.shape[-2]
    if slots % least:
        what = "a page" if isinstance(cache, PagedCache) else "a row"
        return f"{slots} tokens in {what} of {cache.keys.dtype}, it takes a multiple of {least}"
    return None


IMPLEMENTATION = Implementation("tpu", tpu, refusal, returns_lse=True)
