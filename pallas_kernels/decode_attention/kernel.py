"""The TPU kernel of decode attention: pages of the cache stream by, a row's queries stay."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.plan import QueryLayout

FORBIDDEN = -1e30  # a score that is no one's; its exponential is exactly zero


@dataclasses.dataclass(frozen=True)
class Shape:
    """Numbers that the kernel is compiled for."""

    layout: QueryLayout
    page: int
    pages: int  # of a step
    table_width: int  # entries of a row in the page table; 0: a row's pages follow each other
    slots: int  # of a row
    batch: int
    scale: float
    softcap: float | None
    window: int | None
    quantized: bool
    ring: bool
    bias: str | None  # None, "linear" or "buckets"
    dtype: Any  # of the products; in float32 they are exact
    integer: bool  # products of int8 keys with queries in two parts of int8

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.page * self.pages

    @property
    def half(self) -> int:
        """Rows of one part of a group's queries in int8, of which two fill whole tiles."""
        return -(-self.layout.rows // 16) * 16


@dataclasses.dataclass(frozen=True)
class Refs:
    """References that the kernel reads and writes."""

    begin: Any  # scalars, [splits * batch]
    end: Any
    follower: Any  # [splits * (batch + 1)]
    table: Any  # [batch * table_width], or of each row its first page
    lengths: Any
    first: Any
    q: Any
    q_scales: Any  # of queries in int8
    bias: Any
    limits: Any  # of buckets, in scalar memory
    hbm: tuple[Any, ...]  # keys, values and their scales
    output: Any
    lse: Any
    buffers: tuple[Any, ...]
    semaphores: Any
    steps: Any  # in scalar memory: steps so far, by which the buffers alternate
    top: Any
    total: Any
    sum: Any


def decode_kernel(shape: Shape, refs: Refs) -> None:
    """Attends one row's queries to one split of its pages; the grid is (splits, batch).

    While a step computes, the pages of the next one are copied, which may be the next row's.
    """
    split, row = pl.program_id(0), pl.program_id(1)
    base = split * shape.batch
    following = split * (shape.batch + 1) + row

    @pl.when(row == 0)
    def _begin():
        refs.steps[0] = 0
        chosen = refs.follower[following]

        @pl.when(chosen < shape.batch)
        def _fetch():
            start(shape, refs, 0, chosen, refs.begin[base + chosen], refs.end[base + chosen])

    refs.top[...] = jnp.full_like(refs.top, FORBIDDEN)
    refs.total[...] = jnp.zeros_like(refs.total)
    refs.sum[...] = jnp.zeros_like(refs.sum)
    begin, end = refs.begin[base + row], refs.end[base + row]

    def step(number, _):
        buffer = refs.steps[0] % 2
        page = begin + number * shape.pages
        more = page + shape.pages < end
        chosen = jnp.where(more, row, refs.follower[following + 1])

        @pl.when(chosen < shape.batch)
        def _fetch():
            ahead = jnp.where(more, page + shape.pages, refs.begin[base + chosen])
            start(shape, refs, 1 - buffer, chosen, ahead, refs.end[base + chosen])

        wait(shape, refs, buffer, jnp.minimum(end - page, shape.pages))
        whole = sees_all(shape, refs, row, page, end)
        pl.when(whole)(functools.partial(attend, shape, refs, buffer, row, page, end, masked=False))
        pl.when(jnp.logical_not(whole))(
            functools.partial(attend, shape, refs, buffer, row, page, end, masked=True)
        )
        refs.steps[0] += 1

    jax.lax.fori_loop(0, pl.cdiv(end - begin, shape.pages), step, None)
    total = refs.total[...][:, :1]
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
    refs.output[0, 0] = (refs.sum[...] * inverse).astype(refs.output.dtype)
    lse = refs.top[...] + jnp.log(jnp.where(refs.total[...] > 0, refs.total[...], 1.0))
    refs.lse[0, 0] = jnp.where(refs.total[...] > 0, lse, -jnp.inf)


def copies(shape: Shape, refs: Refs, buffer, row, page, index):
    """The copies of page `page + index` of a row into page `index` of a buffer."""
    if shape.table_width:
        number = refs.table[row * shape.table_width + page + index]
    else:
        number = refs.table[row] + page + index
    for kind, (source, target) in enumerate(zip(refs.hbm, refs.buffers, strict=True)):
        if kind < 2:
            part = target.at[buffer, index]
            source = source.at[number]
        else:
            part = target.at[buffer, :, pl.ds(index * shape.page, shape.page)]
            if shape.table_width:
                source = source.at[number]
            else:
                source = source.at[
                    number // (shape.slots // shape.page),
                    :,
                    pl.ds((page + index) * shape.page, shape.page),
                ]
        yield pltpu.make_async_copy(source, part, refs.semaphores.at[buffer, kind])


def start(shape: Shape, refs: Refs, buffer, row, page, end) -> None:
    """Starts to copy the pages from `page` on, those of a step at most."""

    def one(index, _):
        for copy in copies(shape, refs, buffer, row, page, index):
            copy.start()

    count = end - page

    @pl.when(count >= shape.pages)
    def _whole():
        jax.lax.fori_loop(0, shape.pages, one, None, unroll=min(shape.pages, 8))

    @pl.when(count < shape.pages)
    def _some():
        jax.lax.fori_loop(0, count, one, None)


def wait(shape: Shape, refs: Refs, buffer, count) -> None:
    """Waits until `count` pages are in a buffer; a semaphore counts bytes, whosever they are."""

    def wait_for(kind, part):
        pltpu.make_async_copy(part, part, refs.semaphores.at[buffer, kind]).wait()

    @pl.when(count == shape.pages)
    def _whole():
        for kind, target in enumerate(refs.buffers):
            wait_for(kind, target.at[buffer])

    @pl.when(count < shape.pages)
    def _some():
        def one(_, __):
            for kind, target in enumerate(refs.buffers):
                page = target.at[buffer, 0]
                if kind >= 2:
                    page = target.at[buffer, :, pl.ds(0, shape.page)]
                wait_for(kind, page)

        jax.lax.fori_loop(0, count, one, None)


def sees_all(shape: Shape, refs: Refs, row, page, end):
    """True where every query of a row is real and sees every token of a step."""
    length, first = refs.lengths[row], refs.first[row]
    token = page * shape.page
    tokens_end = token + shape.tokens
    whole = (
        (page + shape.pages <= end)
        & (tokens_end <= first + 1)
        & (first + shape.layout.new <= length)
    )
    if shape.window is not None:
        whole &= token > first + shape.layout.new - 1 - shape.window
    if shape.ring:  # slots are tokens until it comes round
        whole &= length <= shape.slots
    return whole


def attend(shape: Shape, refs: Refs, buffer, row, page, end, masked: bool) -> None:
    """Adds the tokens in a buffer to the running softmax (Milakov and Gimelshein 2018,
    arXiv:1805.02867)."""
    layout = shape.layout
    exact = shape.dtype == jnp.float32
    # Said in any case: a default that asks for more is refused for products of bfloat16.
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    distance, allowed = None, None
    if masked or shape.bias:
        token, distance, query, used = tokens_of(shape, refs, row, page, end)
    if masked:
        length = refs.lengths[row]
        allowed = (distance <= 0) & (token >= 0) & (query < length) & used
        if shape.window is not None:
            allowed &= distance > -shape.window
    rows = [pl.ds(group * layout.rows, layout.rows) for group in range(layout.groups)]
    # In phases over all groups: a phase of one group would wait for its own phase before.
    scores = [
        bent(shape, refs, buffer, group, products(shape, refs, buffer, group, precision), distance)
        for group in range(layout.groups)
    ]
    if masked:
        scores = [jnp.where(allowed, part, FORBIDDEN) for part in scores]
    weights, shrinks = [], []
    tops = [jnp.max(part, axis=1, keepdims=True) for part in scores]
    for group in range(layout.groups):
        before = refs.top[rows[group], :]
        top = jnp.maximum(before, tops[group])
        refs.top[rows[group], :] = top
        shrinks.append(jnp.exp(before - top))
        part = jnp.exp(scores[group] - top[:, :1])
        weights.append(jnp.where(allowed, part, 0.0) if masked else part)
    for group in range(layout.groups):
        total = jnp.sum(weights[group], axis=1, keepdims=True)
        refs.total[rows[group], :] = shrinks[group] * refs.total[rows[group], :] + total
    for group in range(layout.groups):
        part = weights[group]
        if shape.quantized:
            part *= scales_of(shape, refs, 3, buffer, group)
            part = jnp.where(allowed, part, 0.0) if masked else part  # those of no token may be NaN
        values = block(shape, refs, 1, buffer, group, layout.value_dim).astype(shape.dtype)
        if masked:
            values = zero_unused(shape, refs, row, page, end, values)
        added = jnp.dot(
            part.astype(values.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        refs.sum[rows[group], :] = shrinks[group][:, :1] * refs.sum[rows[group], :] + added


def bent(shape: Shape, refs: Refs, buffer, group: int, scores, distance):
    """Scores of a group with the scales of int8 keys, the softcap and the bias."""
    if shape.quantized:
        scores *= scales_of(shape, refs, 2, buffer, group)
    if shape.softcap is not None:
        scores = shape.softcap * jnp.tanh(scores * (1 / shape.softcap))
    if shape.bias:
        rows = pl.ds(group * shape.layout.rows, shape.layout.rows)
        scores += bias_of(shape, refs, rows, distance)
    return scores


def products(shape: Shape, refs: Refs, buffer, group: int, precision):
    """Products of a group's queries with the keys in a buffer, scaled.

    Keys in int8 go to the matrix unit as they are, which takes them in half the time of bfloat16:
    a query is 256 times one int8 part plus another, to 2**-16 of its largest number.
    """
    layout = shape.layout
    by_lane = (((1,), (1,)), ((), ()))
    keys = block(shape, refs, 0, buffer, group, layout.head_dim)
    if not shape.integer:
        q = refs.q[0, pl.ds(group * layout.rows, layout.rows), :]
        keys = keys.astype(shape.dtype)
        kind = {"precision": precision, "preferred_element_type": jnp.float32}
        return jax.lax.dot_general(q, keys, by_lane, **kind) * shape.scale
    q = refs.q[0, pl.ds(group * 2 * shape.half, 2 * shape.half), :]
    kind = {"precision": precision, "preferred_element_type": jnp.int32}
    both = jax.lax.dot_general(q, keys, by_lane, **kind)
    high, low = (both[first : first + layout.rows] for first in (0, shape.half))
    scales = refs.q_scales[0, pl.ds(group * layout.rows, layout.rows), :][:, :1]
    return (256 * high.astype(jnp.float32) + low.astype(jnp.float32)) * (scales * shape.scale)


def tokens_of(shape: Shape, refs: Refs, row, page, end):
    """Of the pairs [rows, tokens]: the key's token, its index less the query's, the query's."""
    layout = shape.layout
    size = layout.rows, shape.tokens
    slot = page * shape.page + jax.lax.broadcasted_iota(jnp.int32, size, 1)
    token = token_of(shape, refs, row, slot, end)
    index = jax.lax.broadcasted_iota(jnp.int32, size, 0)
    query = refs.first[row] + jax.lax.rem(index, jnp.int32(layout.new))
    return token, token - query, query, index < layout.used_rows


def token_of(shape: Shape, refs: Refs, row, slot, end):
    """The token in a slot of a row; below 0 or past the row's end: none, or in a page of which no
    copy was made."""
    copied = slot < end * shape.page
    if not shape.ring:
        return jnp.where(copied, slot, -1)
    last = refs.lengths[row] - 1
    turn = jnp.maximum(last, 0) // shape.slots * shape.slots
    token = slot + turn
    token = jnp.where(token > last, token - shape.slots, token)
    return jnp.where(copied, token, -1)


def zero_unused(shape: Shape, refs: Refs, row, page, end, values):
    """Values with zeros where the row has no token: 0 times what is there may be NaN."""
    slot = page * shape.page + jax.lax.broadcasted_iota(jnp.int32, (shape.tokens, 1), 0)
    token = token_of(shape, refs, row, slot, end)
    held = (token >= 0) & (token < refs.lengths[row])
    return jnp.where(held, values, jnp.zeros_like(values))


def block(shape: Shape, refs: Refs, kind: int, buffer, group: int, size: int):
    """Keys or values [tokens, lanes] of a group."""
    lanes = shape.layout.members * size
    part = refs.buffers[kind][buffer, :, :, pl.ds(group * lanes, lanes)]
    return part.reshape(shape.tokens, lanes)


def scales_of(shape: Shape, refs: Refs, kind: int, buffer, group: int):
    """The scales of a group's tokens for each of its rows."""
    layout = shape.layout
    heads = refs.buffers[kind][buffer, pl.ds(group * layout.members, layout.members), :]
    index = jax.lax.broadcasted_iota(jnp.int32, (layout.rows, shape.tokens), 0)
    scales = jnp.broadcast_to(heads[:1], index.shape)
    for member in range(1, layout.members):
        later = index >= member * layout.repeats * layout.new
        scales = jnp.where(later, heads[member : member + 1], scales)
    return scales


def bias_of(shape: Shape, refs: Refs, rows, distance):
    """The bias of each pair: slope times distance, or the number of the distance's bucket."""
    if shape.bias == "linear":
        return refs.bias[rows, :][:, :1] * distance.astype(jnp.float32)
    table = refs.bias[rows, :]
    found = jnp.broadcast_to(table[:, :1], distance.shape)
    for bucket in range(1, refs.limits.shape[0]):
        beyond = -distance >= refs.limits[bucket]
        found = jnp.where(beyond, table[:, bucket : bucket + 1], found)
    return found
