"""Attention masks: which query sees which key, in a few fields instead of a dense array."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

HostOrDevice = jax.Array | np.ndarray
QUERY_ARRAYS = ("query_segments", "query_ranks")
KEY_ARRAYS = ("key_segments", "key_ranks")


class Tile(enum.IntEnum):
    """Class of a rectangle of queries and keys, as far as it is known."""

    EMPTY = 0  # no query sees any key
    PARTIAL = 1  # some pairs, or unknown
    FULL = 2  # every query sees every key


class Branches(NamedTuple):
    """Positions of a row that its texts share, and behind them a branch for each text.

    A branch sees no other branch, and the shared positions see none: of the pairs that are left the
    rest of the mask decides.

    Attributes:
        shared: positions before the branches.
        length: positions of each branch.
    """

    shared: int
    length: int

    def number(self, positions: Int[Array, "positions"]) -> Int[Array, "positions"]:
        """Branch of each position, -1 for the shared ones."""
        return jnp.maximum((positions - self.shared) // self.length, -1)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The keys that each query may see.

    With i the position of a query and j that of a key, both counted in keys, a pair is allowed if

        (j <= i if `causal`) and (i - j < `window`, and |i - j| < `window` unless `causal`)

    and, where segments are given, only inside one segment. Where ranks are given, `causal` compares
    them instead of positions: a key is seen by queries of its rank or a higher one, wherever they
    stand, and the window reaches to both sides. So the tokens of a prefix that sees itself whole
    all have one rank (prefix language models, GLM's part A); a permutation is a rank for each.

    It is a pytree of its arrays; `causal`, `window`, `branches` and an `offset` that is a Python
    int are static, so that tiles that they rule out are never computed.

    Attributes:
        causal: no query sees a later key, or with ranks one of a higher rank.
        window: how many keys a query sees on a side, itself included; None is all of them.
        query_segments, key_segments: pairs with unlike numbers do not see each other, and 0 is
            padding, which sees nothing and is seen by nothing. Both or neither.
        query_ranks, key_ranks: what `causal` compares; None: the positions. Both or neither.
        branches: how positions are divided into shared ones and branches; None: they are not.
        offset: position of the first query, counted in keys: what a KV cache already holds, or the
            first token of a context-parallel shard. May be traced.
    """

    causal: bool = False
    window: int | None = None
    query_segments: Int[HostOrDevice, "batch query"] | None = None
    key_segments: Int[HostOrDevice, "batch key"] | None = None
    query_ranks: Int[HostOrDevice, "batch query"] | None = None
    key_ranks: Int[HostOrDevice, "batch key"] | None = None
    branches: Branches | None = None
    offset: Int[Array, ""] | int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"Mask: window={self.window}, must be at least 1 (a query sees itself)"
            )
        for what in ("segments", "ranks"):
            queries, keys = getattr(self, f"query_{what}"), getattr(self, f"key_{what}")
            if (queries is None) != (keys is None):
                raise ValueError(
                    f"Mask: query_{what} and key_{what} are given together or not at all"
                )
        if self.query_ranks is not None and not self.causal:
            raise ValueError("Mask: ranks without causal=True, which alone compares them")
        if self.branches is not None and self.window is not None:
            raise ValueError("Mask: a window counts keys, which are not those of one branch")

    def tree_flatten_with_keys(self):
        names = [*QUERY_ARRAYS, *KEY_ARRAYS]
        static_offset = self.offset if isinstance(self.offset, int) else None
        if static_offset is None:
            names.append("offset")
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names]
        return children, (self.causal, self.window, self.branches, static_offset)

    @classmethod
    def tree_unflatten(cls, static, children):
        # Not through __init__: while jax rebuilds trees the leaves may be any objects.
        mask = object.__new__(cls)
        causal, window, branches, static_offset = static
        *arrays, offset = children if static_offset is None else (*children, static_offset)
        fields = {
            "causal": causal,
            "window": window,
            **dict(zip((*QUERY_ARRAYS, *KEY_ARRAYS), arrays)),
            "branches": branches,
            "offset": offset,
        }
        for name, value in fields.items():
            object.__setattr__(mask, name, value)
        return mask

    @property
    def is_full(self) -> bool:
        """Returns whether every query sees every key."""
        plain = not self.causal and self.window is None and self.branches is None
        return plain and self.query_segments is None

    @property
    def causal_by_position(self) -> bool:
        """Returns whether no query sees a key at a later position."""
        return self.causal and self.query_ranks is None

    def mapped(self, queries: Callable[[Any], Any], keys: Callable[[Any], Any]) -> Mask:
        """The mask with its arrays [batch, query] and [batch, key] put through functions."""
        changes = {}
        for function, names in ((queries, QUERY_ARRAYS), (keys, KEY_ARRAYS)):
            for name in names:
                if getattr(self, name) is not None:
                    changes[name] = function(getattr(self, name))
        return dataclasses.replace(self, **changes)

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "batch 1 query key"]:
        """The mask as an array, True where a query sees a key; `batch` is 1 without arrays."""
        rows, keys = jnp.arange(query_length), jnp.arange(key_length)
        return self.allowed(rows, keys)[:, None]

    def allowed(
        self,
        rows: Int[Array, "query"],
        keys: Int[Array, "key"],
    ) -> Bool[Array, "batch query key"]:
        """Returns whether these rows (counted from the first query) see these keys.

        The mask's arrays are those of the rows and keys asked for: see `mapped`.
        """
        distance = (self.offset + rows)[:, None] - keys[None, :]
        seen = jnp.ones(distance.shape, bool)
        if self.causal_by_position:
            seen &= distance >= 0
        if self.window is not None:
            seen &= (distance if self.causal_by_position else jnp.abs(distance)) < self.window
        if self.branches is not None:
            own, other = map(self.branches.number, (self.offset + rows, keys))
            seen &= (other < 0) | (own[:, None] == other)
        seen = seen[None]
        if self.query_ranks is not None:
            seen &= self.key_ranks[:, None, :] <= self.query_ranks[:, :, None]
        if self.query_segments is not None:
            same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            seen &= same & (self.query_segments != 0)[:, :, None]
        return seen

    def key_range(self, start: int, stop: int, key_length: int) -> tuple[int, int]:
        """Keys outside of which rows `start` to `stop` certainly see nothing, as (first, end)."""
        if not isinstance(self.offset, int):
            return 0, key_length
        first, end = 0, key_length
        if self.causal_by_position:
            end = self.offset + stop
        elif self.window is not None:
            end = self.offset + stop - 1 + self.window
        if self.window is not None:
            first = self.offset + start - self.window + 1
        first, end = (min(max(index, 0), key_length) for index in (first, end))
        return first, max(first, end)

    def tile(self, rows: tuple[int, int], keys: tuple[int, int]) -> Tile:
        """Class of the tile of rows `rows[0]` to `rows[1]` and keys `keys[0]` to `keys[1]`."""
        if self.is_full:
            return Tile.FULL
        if not isinstance(self.offset, int):
            return Tile.PARTIAL
        first, end = self.key_range(*rows, key_length=keys[1])
        if first >= end or end <= keys[0]:
            return Tile.EMPTY
        nearest = self.offset + rows[0] - (keys[1] - 1)  # smallest i - j of the tile
        farthest = self.offset + rows[1] - 1 - keys[0]
        full = self.query_segments is None and self.query_ranks is None and self.branches is None
        if self.causal_by_position:
            full &= nearest >= 0
        if self.window is not None:
            full &= farthest < self.window and (self.causal_by_position or -nearest < self.window)
        return Tile.FULL if full else Tile.PARTIAL

    def may_have_fully_masked_rows(self, start: int, stop: int, key_length: int) -> bool:
        """Returns whether some row from `start` to `stop` may see nothing, as far as is known."""
        if self.query_segments is not None or self.query_ranks is not None or key_length == 0:
            return True
        if not self.causal and self.window is None:
            return False
        if not isinstance(self.offset, int):
            return True
        last = self.offset + stop - 1
        too_late = self.window is not None and last - self.window + 1 > key_length - 1
        first_seen = 0 if self.causal else 1 - self.window
        too_early = self.offset + start < first_seen
        return too_late or too_early
