"""The forward kernel: one strip of queries of one head, and one span of keys.

It walks over the list of the tiles of keys that are not empty, and of each runs the code of the
tile's kind, in which the parts above the diagonal do not occur. A tile is computed in rectangles
small enough for registers. The products of keys and queries are several rectangles ahead of their
softmax in the program, so that the matrix unit does not wait: the compiler's schedule keeps to the
order of the program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.mask import Tile
from pallas_kernels.attention.tpu.blocks import ForwardBlocks
from pallas_kernels.attention.tpu.lowering import LOG2E, Kind, Rules
from pallas_kernels.attention.tpu.parts import (
    LEAST,
    SUBLANES,
    Pairs,
    column,
    factors,
    scores,
    toeplitz_part,
)


@dataclasses.dataclass(frozen=True)
class ForwardPlan:
    """Facts of a call that the kernel knows while it is traced.

    Attributes:
        rules, blocks: of the call.
        kinds: of tiles.
        keys: how many there are with padding.
        walks: over spans of keys, which a strip of queries has.
        strips: how many tiles of queries there are.
        shared_lists: whether all batch entries have the same tiles.
        offset: of the mask, or None where it is traced.
        names: of the operands.
    """

    rules: Rules
    blocks: ForwardBlocks
    kinds: tuple[Kind, ...]
    keys: int
    walks: int
    strips: int
    shared_lists: bool
    offset: int | None
    scalars: tuple[str, ...]
    operands: tuple[str, ...]

    def walk(self, batch: Any, strip: Any, number: Any) -> Any:
        """Index of a walk over a span of keys in the lists of tiles."""
        return ((0 if self.shared_lists else batch) * self.strips + strip) * self.walks + number


def kernel(plan: ForwardPlan, *refs):
    """One strip of queries of one head, and one span of keys."""
    count = len(plan.scalars), len(plan.operands)
    scalars = dict(zip(plan.scalars, refs))
    operands = dict(zip(plan.operands, refs[count[0] :]))
    output, lse, total, top, sums = refs[sum(count) :]
    b, h, i, s = (pl.program_id(axis) for axis in range(4))
    walk = plan.walk(b, i, s)
    span = scalars["spans"][walk]

    @pl.when(s == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, LEAST)
        sums[...] = jnp.zeros_like(sums)

    tiles = plan.blocks.span // plan.blocks.key

    def step(n, _):
        entry = scalars["entries"][walk * tiles + n]
        first = pl.multiple_of((entry >> 4) * plan.blocks.key, plan.blocks.key)
        for code, kind in enumerate(plan.kinds, start=1):

            @pl.when((entry & 15) == code)
            def _(kind=kind):
                tile = _Tile(plan, kind, scalars, operands, (h, i, span), first)
                tile.run(total, top, sums)

    jax.lax.fori_loop(0, scalars["counts"][walk], step, None)

    @pl.when(s == plan.walks - 1)
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

    plan: ForwardPlan
    kind: Kind
    scalars: dict[str, Any]
    operands: dict[str, Any]
    at: tuple[Any, Any, Any]
    first: Any

    def run(self, total, top, sums) -> None:
        """Adds the tile to the running output, maximum and sums."""
        chunks = self._chunks()
        ahead = [self._products(*chunk) for chunk in chunks[: self.plan.blocks.ahead]]
        columns: dict[tuple[str, int], Any] = {}
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

    def _part(self, key: int, queries: slice, columns=None, tile: Tile = Tile.FULL) -> Pairs:
        """The numbers that scores depend on; `columns` keeps what rectangles share."""
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
        return Pairs(
            query=query,
            position=query + offset,
            key=span * plan.blocks.span + self.first + key,
            tile=tile,
            ends=plan.rules.key_length < plan.keys,
            query_numbers=rows,
            key_numbers=cols,
            bias=self._bias(key, queries, rows, cols, columns) if columns is not None else None,
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

    def _bias(self, key: int, queries: slice, rows, cols, columns):
        """The bias of a chunk, or None."""
        if "bias" in self.operands:
            return self.operands["bias"][self._keys(key), queries].astype(jnp.float32) * LOG2E
        if "bias" in rows or "bias" in cols:
            return rows.pop("bias", None) if "bias" in rows else cols.pop("bias")
        if "differences" not in self.operands:
            return None
        part = self.plan.blocks.part
        bands = []
        for k in range(key, key + self.plan.blocks.chunk_keys, part):
            lanes = range(queries.start, queries.stop, part)
            bands.append(_along_lanes([self._differences(query - k, columns) for query in lanes]))
        return jnp.concatenate(bands, axis=0)

    def _differences(self, lead: int, columns):
        """The bias of a part whose queries are `lead` further in the tile than its keys."""
        if ("differences", lead) not in columns:
            plan, (_, strip, span) = self.plan, self.at
            first = span * plan.blocks.span + self.first - strip * plan.blocks.query
            row = jax.lax.div(plan.keys + lead - first, plan.blocks.part)
            here, there = (self.operands["differences"][pl.ds(at, 1), :] for at in (row, row + 1))
            columns["differences", lead] = toeplitz_part(here, there)
        return columns["differences", lead]


def _along_lanes(pieces: list[jax.Array]):
    """Arrays one after another along their last axis."""
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def _dot(a, b):
    """A product accumulated in float32; of float32 in full precision."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=exact)
