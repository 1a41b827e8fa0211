"""The kernel of the gradients of attention on TPUs, all of them from one walk over the tiles.

A step has one block of queries and a span of keys. It walks over the tiles of the span that are not
empty and makes the scores of each once more, for five products a tile: scores, gradients of the
weights, and the contributions to the gradients of values, keys and queries. Sums over queries stay
in VMEM in float32 as long as the span does, over all blocks of queries and all query heads of a key
head, so that the order of every sum is fixed. The gradient of the queries is complete after a step
where one span has all keys; else the steps of the spans add to it in HBM, one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mask import Tile
from pallas_kernels.attention.tpu.backward_blocks import BackwardBlocks
from pallas_kernels.attention.tpu.lowering import LOG2E, Kind, Rules
from pallas_kernels.attention.tpu.parts import Pairs, column, factors, scores, toeplitz

FLOAT32 = jnp.float32
Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Walk:
    """Facts of a call of the kernel that are known while tracing.

    Attributes:
        rules: of the call.
        blocks: sizes, fitted to the call.
        kinds: of tiles.
        spans: of keys.
        offset: of the mask; None is a traced one.
        bias: "" for none, "linear", "distance" for other biases by distance, else that of an array,
            by the axes that it has: "pairs", "keys", "queries", "heads".
        ends: whether keys of padding may be in a tile.
    """

    rules: Rules
    blocks: BackwardBlocks
    kinds: tuple[Kind, ...]
    spans: int
    offset: int | None
    bias: str
    ends: bool

    @property
    def tiles(self) -> int:
        """Number of tiles of a step."""
        return self.blocks.span // self.blocks.key


@dataclasses.dataclass(frozen=True)
class _Strip:
    """Some keys of a tile and the queries that may see some of them."""

    key: int
    keys: int
    first: int
    end: int
    tile: Tile

    @property
    def queries(self) -> slice:
        return slice(self.first, self.end)


def kernel(walk: Walk, names: tuple[str, ...], *refs) -> None:
    """One step of the grid [batch, kv_heads, spans, query heads of a key head, query blocks]."""
    r = dict(zip(names, refs, strict=True))
    if walk.blocks.shares > 1:  # results in float32 are their own sums
        r["d_keys"], r["d_values"] = r["d_k"], r["d_v"]
    batch, kv_head, span, head, block = (pl.program_id(axis) for axis in range(5))
    head_count, blocks = pl.num_programs(3), pl.num_programs(4)
    count = r["codes"][0, walk.tiles]
    r["head"] = kv_head * head_count + head

    _clear(walk, r, head, block)
    first = (span == 0) & (head == 0) & (block == 0)
    last = (span == walk.spans - 1) & (head == head_count - 1) & (block == blocks - 1)
    rows = pl.ds(block * walk.blocks.query, walk.blocks.query)
    d_q = r["d_q"].at[batch, r["head"], rows] if walk.spans > 1 else r["d_q"]
    finish = _begin_queries(walk, r, d_q, first, span, count)

    def tile(number, _):
        code = r["codes"][0, number]
        for index, kind in enumerate(walk.kinds, start=1):

            @pl.when(code == index)
            def _(kind=kind):
                _tile(walk, kind, r, span, block, number)

        return 0

    @pl.when(count > 0)
    def _():
        jax.lax.fori_loop(0, walk.tiles, tile, 0)

    finish(last)

    @pl.when((head == head_count - 1) & (block == blocks - 1))
    def _():
        r["d_k"][...] = (r["d_keys"][...] * walk.rules.scale).astype(r["d_k"].dtype)
        r["d_v"][...] = r["d_values"][...].astype(r["d_v"].dtype)


def _clear(walk: Walk, r: Refs, head, block) -> None:
    """Sets the sums that begin with a step to zero."""
    r["d_queries"][...] = jnp.zeros_like(r["d_queries"])

    @pl.when((head == 0) & (block == 0))
    def _():
        r["d_keys"][...] = jnp.zeros_like(r["d_keys"])
        r["d_values"][...] = jnp.zeros_like(r["d_values"])
        if walk.blocks.transposed:
            for at in range(0, walk.blocks.span, walk.blocks.part):
                keys = slice(at, at + walk.blocks.part)
                r["keys_across"][:, keys] = r["k"][keys].T

    if walk.bias in ("keys", "distance"):

        @pl.when(block == 0)
        def _():
            r["d_bias"][...] = jnp.zeros_like(r["d_bias"])

    elif "d_bias" in r:
        r["d_bias"][...] = jnp.zeros_like(r["d_bias"])


def _begin_queries(walk: Walk, r: Refs, result, first, span, count) -> Callable[[Any], None]:
    """Prepares a step's gradient of the queries; the function that it returns writes it."""

    def total():
        found = r["d_queries"][...] * walk.rules.scale
        return found.T if walk.blocks.transposed else found

    def write(last):
        result[...] = total().astype(result.dtype)

    if walk.spans == 1:
        return write

    # Sums over spans are in HBM; a step that computes nothing leaves them alone, except the first.
    fetch = pltpu.make_async_copy(result, r["sums"], r["arrived"])
    put = pltpu.make_async_copy(r["sums"], result, r["left"])
    busy, under_way = (span == 0) | (count > 0), r["under_way"]

    @pl.when(first)
    def _():
        under_way[0] = 0

    _settle(put, under_way, busy)

    @pl.when(busy & (span > 0))
    def _():
        fetch.start()

    def finish(last):
        @pl.when(span == 0)
        def _():
            r["sums"][...] = total()

        @pl.when(busy & (span > 0))
        def _():
            fetch.wait()
            r["sums"][...] += total()

        @pl.when(busy)
        def _():
            put.start()
            under_way[0] = 1

        _settle(put, under_way, last)

    return finish


def _settle(put, under_way, condition) -> None:
    """Waits for a copy if there is one."""

    @pl.when(condition & (under_way[0] == 1))
    def _():
        put.wait()
        under_way[0] = 0


def strips(walk: Walk, kind: Kind) -> list[_Strip]:
    """The strips of a tile of a kind, without those that are empty by position, the widest first.

    So the matrix units have work enough while the first scores are made.
    """
    return sorted(_strips(walk, kind), key=lambda strip: strip.first - strip.end)


def _strips(walk: Walk, kind: Kind) -> Iterator[_Strip]:
    """The strips in their order."""
    parts, part, tile = kind.parts, walk.blocks.part, walk.blocks.key
    plain = not kind.arrays and all(one == Tile.FULL for row in parts for one in row)
    size = min(walk.blocks.strip if plain else walk.blocks.edge_strip, tile)
    for key in range(0, tile, size):
        rows = parts[key // part : -(-(key + size) // part)]
        seen = [at for at in range(len(parts[0])) if any(row[at] for row in rows)]
        if not seen:
            continue
        first, end = seen[0], seen[-1] + 1
        full = all(one == Tile.FULL for row in rows for one in row[first:end])
        keys = min(size, tile - key)
        position = Tile.FULL if full else Tile.PARTIAL
        yield _Strip(key, keys, first * part, end * part, position)


def _tile(walk: Walk, kind: Kind, r: Refs, span, block, number) -> None:
    """Adds a tile's contributions to all sums."""
    start = pl.multiple_of(number * walk.blocks.key, walk.blocks.key)
    for strip in strips(walk, kind):
        keys = pl.ds(start + strip.key, strip.keys)
        queries = strip.queries
        q, d_output = r["q"][queries], r["d_output"][queries]
        part = _part(walk, kind, r, strip, span, block, number)
        found, gain = scores(walk.rules, _product(r["k"][keys], q, 1, 1), part)
        weights = jnp.exp2(found - r["rows"][0:1, queries])
        d_weights = _product(r["v"][keys], d_output, 1, 1)
        kept = weights
        if walk.rules.dropout:
            by = factors(walk.rules, weights.shape, part)
            kept, d_weights = weights * by, d_weights * by
        d_scores = weights * (d_weights - r["rows"][1:2, queries])
        if "d_bias" in r:
            _add_bias(walk, r, d_scores, strip, start, block)
        if gain is not None:
            d_scores *= gain
        d_scores = d_scores.astype(q.dtype)
        r["d_values"][keys] += _product(kept.astype(q.dtype), d_output, 1, 0)
        r["d_keys"][keys] += _product(d_scores, q, 1, 0)
        if walk.blocks.transposed:
            r["d_queries"][:, queries] += _product(r["keys_across"][:, keys], d_scores, 1, 0)
        else:
            r["d_queries"][queries] += _product(d_scores, r["k"][keys], 0, 0)


def _product(a, b, a_axis: int, b_axis: int):
    """The product of two matrices over one axis of each, in float32."""
    # Not None: that is a setting of jax, and products of bfloat16 have no other precision.
    precision = jax.lax.Precision.HIGHEST if a.dtype == FLOAT32 else jax.lax.Precision.DEFAULT
    axes = ((a_axis,), (b_axis,)), ((), ())
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=FLOAT32)


def _part(walk: Walk, kind: Kind, r: Refs, strip: _Strip, span, block, number) -> Pairs:
    """The numbers that the scores of a strip depend on."""
    wide = strip.end - strip.first
    query = block * walk.blocks.query + strip.first
    offset = r["offset"][0] if walk.offset is None else walk.offset
    local = number * walk.blocks.key + strip.key
    row = number * (walk.blocks.key // walk.blocks.part) + strip.key // walk.blocks.part
    of_keys, of_queries = {}, {}
    for what in ("segments", "ranks"):
        if kind.arrays and f"query_{what}" in r:
            of_queries[what] = r[f"query_{what}"][:, strip.queries]
            of_keys[what] = _across(r[f"key_{what}"], row, strip.keys, wide)
    if walk.rules.dropout:
        of_queries["seeds"] = r["seeds"][:, strip.queries]
    bias = _bias(walk, r, strip, span, block, row, number)
    return Pairs(
        query=query,
        position=offset + query,
        key=span * walk.blocks.span + local,
        tile=strip.tile,
        ends=walk.ends,
        query_numbers=of_queries,
        key_numbers=of_keys,
        bias=bias,
        slope=r["slopes"][r["head"]] if walk.bias == "linear" else None,
    )


def _across(ref, row, keys: int, wide: int):
    """Numbers of keys, in rows from `row` on, as an array [keys, wide] constant along lanes."""
    part = ref.shape[-1]
    columns = [column(ref[pl.ds(row + n, 1)]) for n in range(keys // part)]
    tall = columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=0)
    times = wide // part
    return tall if times == 1 else jnp.concatenate([tall] * times, axis=1)


def _bias(walk: Walk, r: Refs, strip: _Strip, span, block, row, number):
    """The bias of a strip times log2(e), which broadcasts to [keys, queries], or None."""
    if walk.bias in ("", "linear"):
        return None
    if walk.bias == "distance":
        part, blocks = walk.blocks.part, walk.blocks
        end = walk.spans * blocks.span // part
        first = block * (blocks.query // part) + strip.first // part + end
        first -= span * (blocks.span // part) + row
        rows = range(strip.keys // part)
        return jnp.concatenate([_toeplitz(r["bias"], first - n, strip) for n in rows], axis=0)
    if walk.bias == "pairs":
        start = pl.multiple_of(number * walk.blocks.key, walk.blocks.key)
        keys = pl.ds(start + strip.key, strip.keys)
        return r["bias"][keys, strip.queries].astype(FLOAT32) * LOG2E
    if walk.bias == "keys":
        return _across(r["bias"], row, strip.keys, strip.end - strip.first)
    return r["bias"][:, strip.queries]


def _toeplitz(ref, first, strip: _Strip):
    """A bias by distance for a part of the keys and all queries of a strip."""
    part = ref.shape[-1]
    rows = range((strip.end - strip.first) // part + 1)
    numbers = jnp.concatenate([ref[pl.ds(first + at, 1)] for at in rows], axis=1)
    return toeplitz(numbers, part)


def _add_bias(walk: Walk, r: Refs, d_scores, strip: _Strip, start, block) -> None:
    """Adds the gradients of a strip's scores to that of the bias, summed as far as it is."""
    keys, queries = pl.ds(start + strip.key, strip.keys), strip.queries
    part = walk.blocks.part
    if walk.bias == "pairs":
        r["d_bias"][keys, queries] = d_scores
    elif walk.bias == "keys":
        lanes = range(0, d_scores.shape[1], part)
        r["d_bias"][keys] += sum(d_scores[:, at : at + part] for at in lanes)
    elif walk.bias == "distance":
        for at in range(0, strip.keys, part):
            wide = _diagonals(d_scores[at : at + part])
            first = block * walk.blocks.query + strip.first - (start + strip.key + at)
            first = pl.multiple_of(first + walk.blocks.span - part, part)
            r["d_bias"][:, pl.ds(first, wide.shape[1])] += wide
    else:
        rows = range(0, d_scores.shape[0], 8)
        r["d_bias"][:, queries] += sum(d_scores[at : at + 8] for at in rows)


def _diagonals(d_scores):
    """Sums over diagonals [8, queries + keys]: row r, moved r to the left, has at keys + e those of
    pairs whose query is e after the key."""
    part = d_scores.shape[0]
    zeros = jnp.zeros((part, part), FLOAT32)
    found = jnp.concatenate([zeros, d_scores], axis=1)
    size = part // 2
    while size >= 8:
        found = found[:size] + pltpu.roll(found[size:], found.shape[1] - size, 1)
        size //= 2
    return found
