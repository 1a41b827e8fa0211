"""Scores of the pairs of one tile: masks, biases, softcap and dropout, in either orientation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.dropout import mixed, threshold
from pallas_kernels.attention.hopper.plan import KernelPlan
from pallas_kernels.attention.hopper.warpgroup import Warpgroup, spread
from pallas_kernels.pallas import pl

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class HopperPairs:
    """A tile of queries and keys, of which a warpgroup holds the scores.

    Attributes:
        plan: of the call.
        group: the warpgroup.
        inputs: references to the arrays of mask, bias and dropout, by name.
        batch, head: indices of the row and of the query head.
        query, key: indices of the first query and key.
        shape: of the tile.
        query_axis: 0, or 1 where keys are the rows.
    """

    plan: KernelPlan
    group: Warpgroup
    inputs: dict[str, Any]
    batch: Any
    head: Any
    query: Any
    key: Any
    shape: tuple[int, int]
    query_axis: int = 0

    def masked(self, values: jax.Array, fill: float) -> jax.Array:
        """Values of the tile with `fill` for pairs that the mask forbids.

        One condition after another: together they would need more registers than there are.
        """
        plan = self.plan
        queries, keys = self._positions()
        conditions = []
        if plan.key_length % self._sizes[1]:
            conditions.append(lambda: keys < plan.key_length)
        if plan.causal_by_position:
            conditions.append(lambda: keys <= queries)
        if plan.window is not None:
            conditions.append(lambda: keys > queries - plan.window)
            if not plan.causal_by_position:
                conditions.append(lambda: keys < queries + plan.window)
        if "key_ranks" in self.inputs:
            conditions.append(lambda: self._keys("key_ranks") <= self._queries("query_ranks"))
        if "key_segments" in self.inputs:
            conditions.append(self._same_segment)
        for condition in conditions:
            values = jnp.where(condition(), values, fill)
        return values

    def logits(self, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scores times log2(e) from products of queries and keys, and the softcap's derivative."""
        plan, gain = self.plan, None
        if plan.softcap is None:
            scores = products * (plan.scale * LOG2E)
        else:
            # tanh by one exponential; where that overflows the quotient is 0, as it should be.
            power = jnp.exp2(products * (2 * LOG2E * plan.scale / plan.softcap))
            bent = 1.0 - 2.0 / (power + 1.0)
            scores, gain = bent * (plan.softcap * LOG2E), 1.0 - bent * bent
        if "slopes" in self.inputs:
            scores = self._add_linear(scores)
        elif "steps" in self.inputs:
            scores = self._add_steps(scores)
        elif "bias" in self.inputs:
            scores = scores + self._dense() * LOG2E
        return scores, gain

    def kept(self) -> jax.Array:
        """Returns which weights dropout keeps."""
        _, keys = self._positions(jnp.uint32)
        hashes = mixed(self._queries("seeds") ^ (keys * jnp.uint32(0x9E3779B9)))
        return hashes >= threshold(self.plan.dropout)

    @property
    def biased(self) -> bool:
        """Returns whether scores have a bias."""
        return bool({"slopes", "steps", "bias"} & self.inputs.keys())

    @property
    def _offset(self):
        return self.plan.offset if self.plan.offset is not None else self.inputs["offset"][0]

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.shape[self.query_axis], self.shape[1 - self.query_axis]

    def _positions(self, dtype=jnp.int32):
        """Positions of queries and of keys, counted in keys, both as tiles."""
        starts = self.query + self._offset, self.key
        axes = self.query_axis, 1 - self.query_axis
        # Added before they are spread: the compiler would keep all indices of a tile in registers.
        return tuple(
            spread((self.group.indices(size, axis) + start).astype(dtype), self.shape, axis)
            for size, axis, start in zip(self._sizes, axes, starts)
        )

    def _same_segment(self) -> jax.Array:
        segments = self._load_queries("query_segments")
        segments = jnp.where(segments == 0, -1, segments)  # padding, unlike that of keys
        return self._keys("key_segments") == spread(segments, self.shape, self.query_axis)

    def _vector(self, reference, axis: int):
        return spread(self.group.load(reference, axis), self.shape, axis)

    def _load_queries(self, name: str):
        reference, rows = self.inputs[name], pl.ds(self.query, self._sizes[0])
        index = (self.batch, self.head) if len(reference.shape) == 3 else (self.batch,)
        return self.group.load(reference.at[(*index, rows)], self.query_axis)

    def _queries(self, name: str):
        """An array of queries, as a tile."""
        return spread(self._load_queries(name), self.shape, self.query_axis)

    def _keys(self, name: str):
        """An array of keys, as a tile."""
        keys = pl.ds(self.key, self._sizes[1])
        return self._vector(self.inputs[name].at[self.batch, keys], 1 - self.query_axis)

    def _add_linear(self, scores):
        slope = self.inputs["slopes"][self.head]
        queries, keys = self._positions(jnp.float32)
        return scores + keys * slope - queries * slope

    def _add_steps(self, scores):
        """Adds a bias that is constant between `starts` of distances, of which a tile has few."""
        at, starts, steps = (self.inputs[name] for name in ("step_at", "starts", "steps"))
        queries, keys = self._sizes
        last = self.plan.query_length - 1
        # Of the tile's smallest distance, and of its largest.
        first = at[jnp.maximum(self.key - self.query - (queries - 1) + last, 0)]
        end = at[jnp.minimum(self.key - self.query + (keys - 1) + last, at.shape[0] - 1)]
        positions = self._positions()
        distance = positions[1] - positions[0]
        scores = scores + steps[self.head, first, 0]

        def step(index, scores):
            rise = steps[self.head, index, 1]
            return scores + jnp.where(distance >= starts[index], rise, 0.0)

        return lax.fori_loop(first + 1, end + 1, step, scores)

    def _dense(self):
        """The tile of a bias that is an array, with axes of size 1 where it is broadcast."""
        reference = self.inputs["bias"]
        sizes = reference.shape
        batch, head = self.batch if sizes[0] > 1 else 0, self.head if sizes[1] > 1 else 0
        spans = [pl.ds(self.query, self._sizes[0]), pl.ds(self.key, self._sizes[1])]
        if self.query_axis:  # the array was transposed by the caller
            spans.reverse()
        wide = [size > 1 for size in sizes[2:]]
        if all(wide):
            return self.group.load_tile(reference.at[batch, head, spans[0], spans[1]])
        if not any(wide):
            return reference[batch, head, 0, 0]
        axis = 0 if wide[0] else 1
        index = (spans[0], 0) if wide[0] else (0, spans[1])
        return self._vector(reference.at[(batch, head, *index)], axis)
