"""The parts of each row's cache that a kernel reads, and the layout of its rows of queries."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LANES = 128  # of a vector register


@dataclasses.dataclass(frozen=True)
class QueryLayout:
    """Query heads in groups whose key heads fill whole tiles of lanes.

    A group's queries are the rows of one matrix product with the group's lanes of the cache: row
    (key head of the group, query head of it, new token) has its numbers at the lanes of its own key
    head and zeros at the others. Several key heads are put into a group where they are narrower
    than a tile, or where the rows of one would leave the vector registers' eight rows empty.
    """

    kv_heads: int
    repeats: int  # query heads of a key head
    new: int
    head_dim: int
    value_dim: int

    @property
    def members(self) -> int:
        """Key heads of a group."""
        sizes = self.head_dim, self.value_dim
        divisors = [n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0]
        aligned = [n for n in divisors if all(n * size % LANES == 0 for size in sizes)]
        filled = [n for n in aligned if n * self.repeats * self.new >= 8]
        return (filled or aligned[-1:] or [self.kv_heads])[0]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.kv_heads // self.members

    @property
    def used_rows(self) -> int:
        """Rows of a group that are queries."""
        return self.members * self.repeats * self.new

    @property
    def rows(self) -> int:
        """Rows of a group with those that fill the last register."""
        return -(-self.used_rows // 8) * 8

    def spread(
        self, q: Float[Array, "batch new heads head_dim"]
    ) -> Float[Array, "batch all_rows lanes"]:
        """Queries as the rows of all groups one after another."""
        batch, members = q.shape[0], self.members
        q = q.reshape(batch, self.new, self.groups, members, self.repeats, self.head_dim)
        q = jnp.transpose(q, (0, 2, 3, 4, 1, 5))
        own = jnp.eye(members, dtype=bool)[:, None, None, :, None]
        q = jnp.where(own, q[:, :, :, :, :, None, :], 0)
        q = q.reshape(batch, self.groups, self.used_rows, members * self.head_dim)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, self.rows - self.used_rows), (0, 0)))
        return q.reshape(batch, self.groups * self.rows, -1)

    def collect(
        self, rows: Float[Array, "batch all_rows lanes"]
    ) -> Float[Array, "batch new heads value_dim"]:
        """Outputs of all rows as those of queries and heads."""
        batch, members = rows.shape[0], self.members
        rows = rows.reshape(batch, self.groups, self.rows, -1)[:, :, : self.used_rows]
        shape = batch, self.groups, members, self.repeats, self.new, members, self.value_dim
        rows = rows.reshape(shape)
        own = jnp.eye(members, dtype=bool)[:, None, None, :, None]
        rows = jnp.sum(jnp.where(own, rows, 0), axis=5)
        return self._by_query(rows).reshape(batch, self.new, -1, self.value_dim)

    def collect_numbers(
        self, rows: Float[Array, "batch all_rows"]
    ) -> Float[Array, "batch new heads"]:
        """One number of each row as those of queries and heads."""
        batch = rows.shape[0]
        rows = rows.reshape(batch, self.groups, self.rows)[:, :, : self.used_rows]
        rows = rows.reshape(batch, self.groups, self.members, self.repeats, self.new)
        return self._by_query(rows).reshape(batch, self.new, -1)

    def _by_query(self, rows):
        return jnp.moveaxis(rows, 4, 1)

    def by_row(self, of_heads: Float[Array, "heads columns"]) -> Float[Array, "all_rows columns"]:
        """Numbers of each query head, for every row."""
        shape = self.groups, self.members * self.repeats, 1, of_heads.shape[1]
        rows = jnp.broadcast_to(of_heads.reshape(shape), (*shape[:2], self.new, shape[3]))
        rows = rows.reshape(self.groups, self.used_rows, -1)
        rows = jnp.pad(rows, ((0, 0), (0, self.rows - self.used_rows), (0, 0)))
        return rows.reshape(self.groups * self.rows, -1)


def spans(
    lengths: Int[Array, "batch"],
    first: Int[Array, "batch"],
    new: int,
    slots: int,
    page: int,
    window: int | None,
    splits: int,
    ring: bool,
) -> tuple[Int[Array, "splits batch"], Int[Array, "splits batch"]]:
    """First page and end of the pages that each split of each row reads."""
    held = jnp.minimum(lengths, slots)
    end = -(-jnp.minimum(held, first + new) // page)
    begin = jnp.zeros_like(end)
    if window is not None:
        begin = jnp.maximum(first - window + 1, 0) // page
    if ring:  # one that has come round is read whole
        begin = jnp.where(lengths > slots, 0, begin)
        end = jnp.where(lengths > slots, -(-slots // page), end)
    blind = (first >= lengths) | (first + new <= 0)
    end = jnp.where(blind, begin, jnp.maximum(end, begin))
    share = -(-(end - begin) // splits)
    starts = begin + share * jnp.arange(splits)[:, None]
    return jnp.minimum(starts, end), jnp.minimum(starts + share, end)


def followers(
    begin: Int[Array, "splits batch"], end: Int[Array, "splits batch"]
) -> Int[Array, "splits rows_and_one"]:
    """The row from each one on that has pages, `batch` where none has; the last entry is that."""
    batch = begin.shape[1]
    index = jnp.where(end > begin, jnp.arange(batch), batch)
    index = jnp.concatenate([index, jnp.full((begin.shape[0], 1), batch)], axis=1)
    return jax.lax.cummin(index, axis=1, reverse=True)


def pages_of_a_step(page: int, token_bytes: int, least_bytes: int, most_tokens: int) -> int:
    """Pages that a step reads together: as many as make its copies last longer than they wait."""
    tokens = min(max(least_bytes // token_bytes, page), most_tokens)
    return max(1, math.floor(tokens / page))
