"""Texts of an ONNX file: their positions, who sees whom, and the tables made of both."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmjax.interop.onnx_graph import Graph, Value, cannot
from lmjax.interop.onnx_products import Weights
from lmjax.models import TransformerConfig
from lmjax.models.attention import AttentionConfig
from lmjax.models.positions import (
    ALiBi,
    AttentionPositions,
    BlockPositions,
    EmbeddingPositions,
    LearnedPositions,
    RelativeBuckets,
)
from lmjax.models.rotary import BlockRotary, Rotary, rotary_frequencies
from pallas_kernels.attention import BucketBias

# Added to scores of what is hidden: no exponential is left of it, and a float16 can have it.
HIDDEN = -30_000.0
BATCH, NEW, ALL = "batch_size", "sequence_length", "total_sequence_length"
Rotation = tuple[Value, Value]  # cosines and sines [batch, seq, 1, pairs]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of tokens that a graph reads; inputs of it are made as they are asked for.

    Attributes:
      graph: that reads them.
      ids: input_ids [batch, new].
      mask: attention_mask [batch, all]: 1 for tokens, 0 for padding on either side, or between
        what was read before and what is new.
      past: tokens and padding that were read before; None: there are none.
      ranked: whether ranks say what is seen (`lmjax.models.Batch`), and not the order.
    """

    graph: Graph
    ids: Value
    mask: Value
    past: Value | None
    ranked: bool = False

    @functools.cached_property
    def order(self) -> Value:
        """The number of each token in its text [batch, all]; padding has that before it."""
        return self.graph.op("CumSum", self.mask, self.graph.constant(np.array(1))) - 1

    @functools.cached_property
    def positions(self) -> Value:
        """position_ids of the new tokens [batch, new]; without a cache, by the mask."""
        if self.past is None:
            zero = self.graph.constant(np.zeros(1, np.int64))
            return self.graph.op("Max", self.order, zero)
        return self.graph.input("position_ids", np.int64, (BATCH, NEW))

    @functools.cached_property
    def block_positions(self) -> Value:
        """block_position_ids of the new tokens [batch, new]."""
        return self.graph.input("block_position_ids", np.int64, (BATCH, NEW))

    @functools.cached_property
    def distance(self) -> Value:
        """The number of each token less that of each new one [batch, new, all]."""
        mine = self.order if self.past is None else self.order.rest(self.past, 1)
        return self.order.expand(1) - mine.expand(2)

    def seen(self, causal: bool, window: int | None) -> Value:
        """Pairs of which the new token sees the other [batch, new, all]."""
        zero = self.graph.constant(np.zeros((), np.int64))
        seen = self.graph.op("Less", zero, self.mask, dtype=bool).expand(1)
        if self.ranked:
            seen = seen & self._ranks
        elif causal:
            seen = seen & (self.distance <= 0)
        if window is not None:
            ordered = causal and not self.ranked  # else it reaches to both sides
            near = self.distance if ordered else self.graph.op("Neg", self._far)
            minus = self.graph.constant(np.array(-window))
            seen = seen & self.graph.op("Less", minus, near, dtype=bool)
        return seen

    @functools.cached_property
    def _far(self) -> Value:
        return self.graph.op("Abs", self.distance)

    @functools.cached_property
    def _ranks(self) -> Value:
        """Pairs of new tokens that ranks allow, and all with what came before."""
        ranks = self.graph.input("ranks", np.int64, (BATCH, NEW))
        shape = self.graph.op("Concat", ranks.size(0), self.past, axis=0)
        before = self.graph.op("Expand", self.graph.constant(np.array(-1)), shape)
        both = self.graph.op("Concat", before, ranks, axis=1)
        return both.expand(1) <= ranks.expand(2)


@dataclasses.dataclass(frozen=True)
class TextTables:
    """Facts about positions that all layers of a stack share.

    Attributes:
      rotations: of queries and keys, each of an equal part of a head; empty: they are not turned.
      query_scale: factors of queries [batch, seq, 1, 1].
      biases: of the scores [batch, heads or 1, new, all], by window.
    """

    rotations: tuple[Rotation, ...]
    query_scale: Value | None
    biases: dict[int | None, Value]


def tables(config: TransformerConfig, weights: Weights, texts: Texts) -> TextTables:
    """Tables of the texts of a stack; UserError for positions that no function here writes."""
    attention, graph = config.attention, weights.graph
    rotations, by_distance = (), None
    kind = type(attention.position_rule)
    if kind is Rotary:
        dims = int(attention.head_dim * attention.positions.fraction)
        rotations = (rotation(texts.positions, *frequencies(attention.positions, dims)),)
    elif kind is BlockRotary:
        each = np.asarray(rotary_frequencies(attention.positions.base, attention.head_dim // 2))
        both = texts.positions, texts.block_positions
        rotations = tuple(rotation(positions, each, 1.0) for positions in both)
    elif kind is ALiBi:
        slopes = attention.positions.head_slopes(attention.num_heads).reshape(-1, 1, 1)
        by_distance = texts.distance.cast(np.float32).expand(1) * slopes
    elif kind is RelativeBuckets:
        by_distance = bucket_bias(attention, weights, texts)
    elif kind is not AttentionPositions:
        raise cannot("attention.positions", attention.positions)
    return TextTables(
        rotations, log_scale(attention, texts), biases(graph, config, texts, by_distance)
    )


def frequencies(rotary: Rotary, dims: int) -> tuple[np.ndarray, float]:
    """Radians a token of each pair, and the factor of queries and keys.

    Where they depend on the length of the text they are those of a short one: `context` says of
    which.
    """
    if (scaling := rotary.scaling) is None:
        return np.asarray(rotary_frequencies(rotary.base, dims)), 1.0
    return _at_length(rotary, dims, 1), scaling.magnitude()


def context(config: AttentionConfig) -> int | None:
    """Tokens up to which the rotations of a model are those of a file; None: without bounds."""
    if type(config.positions) is not Rotary or config.positions.scaling is None:
        return None
    dims = int(config.head_dim * config.positions.fraction)
    short, long = (_at_length(config.positions, dims, length) for length in (1, 2**30))
    return None if np.array_equal(short, long) else config.positions.scaling.length


def _at_length(rotary: Rotary, dims: int, length: int) -> np.ndarray:
    lengths = jnp.array([length], jnp.int32)
    return np.asarray(rotary.scaling.frequencies(rotary.base, dims, lengths))


def rotation(positions: Value, frequencies: np.ndarray, magnitude: float) -> Rotation:
    """Cosines and sines of each position's angles; see `lmjax.models.rotary.rotation`."""
    angles = positions.cast(np.float32).expand(2, 3) * frequencies.reshape(1, 1, 1, -1)
    cos, sin = (angles.graph.op(kind, angles) for kind in ("Cos", "Sin"))
    return (cos, sin) if magnitude == 1 else (cos * magnitude, sin * magnitude)


def turned(config: AttentionConfig, tables: TextTables, x: Value) -> Value:
    """Queries or keys [batch, seq, heads, head_dim] with their positions in them."""
    if not tables.rotations:
        return x
    graph, interleaved = x.graph, getattr(config.positions, "interleaved", False)
    width = int(config.head_dim * getattr(config.positions, "fraction", 1))
    each = width // len(tables.rotations)
    sizes = [each] * len(tables.rotations)
    if width < config.head_dim:
        sizes.append(config.head_dim - width)
    parts = split(x, sizes, axis=3)
    found = [turn(a, *pair, each, interleaved) for a, pair in zip(parts, tables.rotations)]
    found += parts[len(found) :]
    return found[0] if len(found) == 1 else graph.op("Concat", *found, axis=3)


def turn(x: Value, cos: Value, sin: Value, width: int, interleaved: bool) -> Value:
    """Each pair of x, whose last axis has this width, turned by its angle."""
    half = width // 2
    if interleaved:  # pairs (2i, 2i + 1)
        x, axis = x.reshape(0, 0, 0, half, 2), 4
        cos, sin = cos.expand(4), sin.expand(4)
    else:
        axis = 3
    first, second = split(x, [1, 1] if interleaved else [half, half], axis)
    both = first * cos - second * sin, second * cos + first * sin
    out = x.graph.op("Concat", *both, axis=axis)
    return out.reshape(0, 0, 0, width) if interleaved else out


def split(x: Value, sizes: list[int], axis: int) -> list[Value]:
    """Parts of these sizes along an axis."""
    if len(sizes) == 1:
        return [x]
    lengths = x.graph.constant(np.array(sizes, np.int64))
    return list(x.graph.op("Split", x, lengths, axis=axis, outputs=len(sizes)))


def bucket_bias(config: AttentionConfig, weights: Weights, texts: Texts) -> Value:
    """The bias of `RelativeBuckets` [batch, heads, new, all], from a row for each distance."""
    rule, graph = config.positions, weights.graph
    farthest = rule.max_distance

    def rows() -> np.ndarray:
        table = jnp.asarray(weights.array("attention_positions.table").T)
        distances = jnp.arange(-farthest, farthest + 1)
        return np.asarray(BucketBias(table, farthest, config.causal).at(distances)).T

    title = weights.title("attention_positions.bias")
    numbers = graph.weight(title, rows)
    low, high = (graph.constant(np.array(end)) for end in (-farthest, farthest))
    found = graph.op("Gather", numbers, graph.op("Clip", texts.distance, low, high) + farthest)
    return found.transpose(0, 3, 1, 2)


def log_scale(config: AttentionConfig, texts: Texts) -> Value | None:
    """Factors of queries by `AttentionConfig.logn_length`."""
    if (length := config.logn_length) is None:
        return None
    graph = texts.graph
    least = graph.constant(np.float32(length))
    positions = graph.op("Max", texts.positions.cast(np.float32) + 1, least)
    return (graph.op("Log", positions) / math.log(length)).expand(2, 3)


def biases(
    graph: Graph, config: TransformerConfig, texts: Texts, by_distance: Value | None
) -> dict[int | None, Value]:
    """The bias of each window of the model."""
    found = {}
    for window in dict.fromkeys(config.windows):
        seen = texts.seen(config.attention.causal, window)
        found[window] = hiding(graph, seen.expand(1))
        if by_distance is not None:
            found[window] = found[window] + by_distance
    return found


def hiding(graph: Graph, seen: Value) -> Value:
    """Numbers that hide what is not seen, once they are added to scores."""
    shown, hidden = (graph.constant(np.float32(number)) for number in (0.0, HIDDEN))
    return graph.op("Where", seen, shown, hidden, dtype=np.float32)


def embedded(config: EmbeddingPositions | None, weights: Weights, texts: Texts) -> Value | None:
    """Rows that positions add to the embeddings; None: nothing."""
    if config is None:
        return None

    def rows(name: str, ids: Value) -> Value:
        return weights.graph.op("Gather", weights.weight(name), ids)

    if type(config) is LearnedPositions:
        ids: Any = texts.positions
        return rows("table", ids + config.offset if config.offset else ids)
    if type(config) is BlockPositions:
        return rows("text.table", texts.positions) + rows("block.table", texts.block_positions)
    raise cannot("positions", config)
