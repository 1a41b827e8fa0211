"""The forward kernel.

A step of the grid has some queries of one head, and the keys and values of that head up to a span
in VMEM. It walks over the list of the tiles of keys that are not empty, and of each runs the code
of the tile's kind, in which the parts above the diagonal do not occur. Scores and output are
transposed, [keys, queries] and [value, queries]: the running maximum and sum are rows
(Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, DistanceBias, LinearBias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Mask, Tile
from pallas_kernels.attention.tpu import lowering
from pallas_kernels.attention.tpu.blocks import Blocks
from pallas_kernels.attention.tpu.lowering import LOG2E, Kind, Rules, round_up
from pallas_kernels.attention.tpu.parts import (
    LEAST,
    Part,
    column,
    factors,
    scores,
    toeplitz_part,
)
from pallas_kernels.manual_axes import vary_alike

SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel knows while it is traced.

    Attributes:
        rules, blocks: of the call.
        kinds: of tiles.
        spans, strips: how many spans of keys and tiles of queries there are.
        shared_lists: whether all batch entries have the same tiles.
        offset: of the mask, or None where it is traced.
        names: of the operands.
    """

    rules: Rules
    blocks: Blocks
    kinds: tuple[Kind, ...]
    spans: int
    strips: int
    shared_lists: bool
    offset: int | None
    scalars: tuple[str, ...]
    operands: tuple[str, ...]


def forward(
    rules: Rules,
    blocks: Blocks,
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
    entries, counts = lowering.tile_lists(codes, span // blocks.key)
    scalars = {"entries": entries.ravel(), "counts": counts.ravel()}
    scalars["fetched"] = _fetched(counts)
    static_offset = isinstance(mask.offset, int)
    if not static_offset:
        scalars["offset"] = jnp.asarray(mask.offset, jnp.int32).reshape(1)
    if isinstance(bias, LinearBias):
        scalars["slopes"] = lowering.slopes(bias)

    operands = _operands(blocks, q, k, v, mask, bias, dropout, queries, keys)
    plan = Plan(
        rules,
        blocks,
        kinds,
        keys // span,
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


def _fetched(counts):
    """Of each span of a strip the one that is in VMEM: itself, or the last with tiles before it.

    Where it is the same as before, nothing is fetched.
    """
    spans = jnp.where(counts > 0, jnp.arange(counts.shape[2]), 0)
    return jax.lax.cummax(spans.astype(jnp.int32), axis=2).ravel()


def _operands(blocks: Blocks, q, k, v, mask, bias, dropout, queries: int, keys: int):
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


def _call(plan: Plan, scalars, operands, batch: int, heads: int, dtype):
    """The kernel on its grid: output [batch, heads, value, query] and sums [.., 1, query]."""
    blocks = plan.blocks
    group = heads // operands["k"].shape[1]
    strips, spans = plan.strips, plan.spans

    def fetched(b, i, s, prefetched):
        table = prefetched[plan.scalars.index("fetched")]
        return table[((0 if plan.shared_lists else b) * strips + i) * spans + s] if spans > 1 else 0

    def spec(name: str, array) -> pl.BlockSpec:
        """Block of an operand: its axes of size 1 are shared."""
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

        def index(b, h, i, s, *prefetched):
            row = b if of_batch else 0
            head = (jax.lax.div(h, group) if name in ("k", "v") else h) if of_head else 0
            lead = (row, head) if array.ndim > 3 else (row,)
            return (*lead, *at(i, fetched(b, i, s, prefetched)))

        return pl.BlockSpec((*(None,) * (array.ndim - len(block)), *block), index)

    rows = operands["v"].shape[3]
    queries = strips * blocks.query
    parts = blocks.query // blocks.part
    like = vary_alike([*scalars.values(), *operands.values()])
    varying = jax.typeof(like[0]).manual_axis_type
    output = (batch, heads, strips * parts, rows, blocks.part), dtype
    shapes = [output, ((batch, heads, 1, queries), jnp.float32)]
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, heads, strips, spans),
            in_specs=[spec(name, array) for name, array in operands.items()],
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
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        interpret=plan.rules.interpret,
        name="attention_forward",
    )(*like)


def _kernel(plan: Plan, *refs):
    """One strip of queries of one head, and one span of keys."""
    count = len(plan.scalars), len(plan.operands)
    scalars = dict(zip(plan.scalars, refs))
    operands = dict(zip(plan.operands, refs[count[0] :]))
    output, lse, total, top, sums = refs[sum(count) :]
    b, h, i, s = (pl.program_id(axis) for axis in range(4))
    row = ((0 if plan.shared_lists else b) * plan.strips + i) * plan.spans + s

    @pl.when(s == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, LEAST)
        sums[...] = jnp.zeros_like(sums)

    tiles = plan.blocks.span // plan.blocks.key

    def step(n, _):
        entry = scalars["entries"][row * tiles + n]
        first = pl.multiple_of((entry >> 4) * plan.blocks.key, plan.blocks.key)
        for code, kind in enumerate(plan.kinds, start=1):

            @pl.when((entry & 15) == code)
            def _(kind=kind):
                tile = _Tile(plan, kind, scalars, operands, (h, i, s), first)
                tile.run(total, top, sums)

    jax.lax.fori_loop(0, scalars["counts"][row], step, None)

    @pl.when(s == plan.spans - 1)
    def _():
        found = jnp.sum(sums[...], axis=0, keepdims=True)
        blind = found == 0.0
        found = jnp.where(blind, 1.0, found)
        scaled = (total[...] * (1.0 / found)).astype(output.dtype)
        part = plan.blocks.part
        for n in range(plan.blocks.query // part):
            output[n] = scaled[:, n * part : (n + 1) * part]
        lse[...] = jnp.where(blind, -jnp.inf, (top[...] + jnp.log2(found)) / LOG2E)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The tile that a kernel is at.

    Attributes:
        at: head, strip of queries and span of keys.
        first: index of its first key in the span.
    """

    plan: Plan
    kind: Kind
    scalars: dict[str, Any]
    operands: dict[str, Any]
    at: tuple[Any, Any, Any]
    first: Any

    def run(self, total, top, sums) -> None:
        """Adds the tile to the running output, maximum and sums."""
        chunks = self._chunks()
        ahead = [self._products(*chunk) for chunk in chunks[: self.plan.blocks.ahead]]
        columns: dict[int, Any] = {}
        for n, (key, queries) in enumerate(chunks):
            products = ahead.pop(0)
            if n + self.plan.blocks.ahead < len(chunks):
                ahead.append(self._products(*chunks[n + self.plan.blocks.ahead]))
            found = self._scores(key, queries, products, columns)
            highest = jnp.maximum(top[:, queries], jnp.max(found, axis=0, keepdims=True))
            weights = jnp.exp2(found - highest)
            decay = jnp.exp2(top[:, queries] - highest)
            top[:, queries] = highest
            part = jnp.sum(weights.reshape(-1, SUBLANES, weights.shape[1]), axis=0)
            sums[:, queries] = sums[:, queries] * decay + part
            if self.plan.rules.dropout:
                weights *= factors(self.plan.rules, weights.shape, self._part(key, queries))
            values = self._values(key)
            more = _dot(values, weights.astype(values.dtype))
            total[:, queries] = total[:, queries] * decay + more

    def _chunks(self) -> list[tuple[int, slice]]:
        """First key and queries of each rectangle of scores that is not empty."""
        blocks, found = self.plan.blocks, []
        for start in range(0, blocks.query, blocks.chunk_queries):
            for key in range(0, blocks.key, blocks.chunk_keys):
                columns = range(start // blocks.part, (start + blocks.chunk_queries) // blocks.part)
                seen = [c for c in columns if self._class(key, c) != Tile.EMPTY]
                if seen:
                    lanes = slice(seen[0] * blocks.part, (seen[-1] + 1) * blocks.part)
                    found.append((key, lanes))
        return found

    def _class(self, key: int, query_part: int) -> Tile:
        """Class by position of a chunk of keys and a part of the queries."""
        first = key // self.plan.blocks.part
        rows = range(first, first + self.plan.blocks.chunk_keys // self.plan.blocks.part)
        classes = {self.kind.parts[row][query_part] for row in rows}
        return classes.pop() if len(classes) == 1 else Tile.PARTIAL

    def _keys(self, key: int, size: int | None = None) -> Any:
        """Some keys of the span."""
        return pl.ds(self.first + key, size or self.plan.blocks.chunk_keys)

    def _products(self, key: int, queries: slice):
        part, q = self.plan.blocks.part, self.operands["q"]
        pieces = [q[n] for n in range(queries.start // part, queries.stop // part)]
        return _dot(self.operands["k"][self._keys(key), :], _along_lanes(pieces))

    def _values(self, key: int):
        """Values of a chunk of keys, transposed."""
        part, v = self.plan.blocks.part, self.operands["v"]
        first = jax.lax.div(self.first, part) + key // part
        return _along_lanes([v[first + n] for n in range(self.plan.blocks.chunk_keys // part)])

    def _scores(self, key: int, queries: slice, products, columns):
        """Scores of a chunk, masked where its parts need it."""
        part = self.plan.blocks.part
        lanes = range(queries.start // part, queries.stop // part)
        runs: list[list[int]] = []
        for lane in lanes:
            if runs and self._class(key, lane) == self._class(key, runs[-1][0]):
                runs[-1].append(lane)
            else:
                runs.append([lane])
        found = []
        for run in runs:
            slot = slice(run[0] * part, (run[-1] + 1) * part)
            piece = products[:, slot.start - queries.start : slot.stop - queries.start]
            of = self._part(key, slot, columns, self._class(key, run[0]))
            found.append(scores(self.plan.rules, piece, of)[0])
        return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)

    def _part(self, key: int, queries: slice, columns=None, tile: Tile = Tile.FULL) -> Part:
        """What the scores of some pairs depend on; `columns` keeps numbers of keys."""
        plan, (_, strip, span) = self.plan, self.at
        query = strip * plan.blocks.query + queries.start
        offset = self.scalars["offset"][0] if plan.offset is None else plan.offset
        rows, cols = {}, {}
        arrays = ("key_segments", "key_ranks") if self.kind.arrays else ()
        for name, ref in self.operands.items():
            if name.startswith("query_"):
                rows[name.removeprefix("query_")] = ref[:, queries]
            elif columns is not None and name in ("key_bias", *arrays):
                cols[name.removeprefix("key_")] = self._column(name, key, queries, columns)
        return Part(
            query=query,
            position=query + offset,
            key=span * plan.blocks.span + self.first + key,
            tile=tile,
            ends=plan.rules.key_length < plan.spans * plan.blocks.span,
            query_numbers=rows,
            key_numbers=cols,
            bias=self._bias(key, queries, rows, cols) if columns is not None else None,
            slope=self.scalars["slopes"][self.at[0]] if "slopes" in self.scalars else None,
        )

    def _column(self, name: str, key: int, queries: slice, columns):
        """Numbers of the keys of a chunk, alike in all lanes."""
        part = self.plan.blocks.part
        if (name, key) not in columns:
            count = self.plan.blocks.chunk_keys // part
            rows = [jax.lax.div(self.first, part) + key // part + n for n in range(count)]
            pieces = [column(self.operands[name][pl.ds(row, 1), :]) for row in rows]
            columns[name, key] = jnp.concatenate(pieces, axis=0) if count > 1 else pieces[0]
        return jnp.concatenate([columns[name, key]] * ((queries.stop - queries.start) // part), 1)

    def _bias(self, key: int, queries: slice, rows, cols):
        """The bias of a chunk, or None."""
        if "bias" in self.operands:
            return self.operands["bias"][self._keys(key), queries].astype(jnp.float32) * LOG2E
        if "bias" in rows or "bias" in cols:
            return rows.pop("bias", None) if "bias" in rows else cols.pop("bias")
        if "differences" not in self.operands:
            return None
        part, ref = self.plan.blocks.part, self.operands["differences"]
        _, strip, span = self.at
        end = self.plan.spans * self.plan.blocks.span
        bands = []
        for k in range(key, key + self.plan.blocks.chunk_keys, part):
            band = []
            for query in range(queries.start, queries.stop, part):
                difference = strip * self.plan.blocks.query + query + end
                difference -= span * self.plan.blocks.span + self.first + k
                row = jax.lax.div(difference, part)
                band.append(toeplitz_part(ref[pl.ds(row, 1), :], ref[pl.ds(row + 1, 1), :]))
            bands.append(jnp.concatenate(band, axis=1))
        return jnp.concatenate(bands, axis=0)


def _along_lanes(pieces: list[jax.Array]):
    """Arrays one after another along their last axis."""
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def _dot(a, b):
    """A product accumulated in float32; of float32 in full precision."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=exact)
