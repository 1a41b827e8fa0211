"""Cases that every implementation of attention runs, and attention in numpy float64 beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import BucketBias, Dropout, LinearBias, Mask

BUCKETS, MAX_DISTANCE = 8, 20  # of biases by distance


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call with small random arrays."""

    name: str
    mask: dict[str, Any]
    queries: int = 21
    keys: int = 21
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    bias: tuple[int, ...] | None = None
    scale: float = 0.4
    softcap: float | None = None
    distance_bias: str = ""  # linear or buckets
    sinks: bool = False
    dropout: float = 0.0

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray | None]:
        """q, k, v, bias, sinks and the gradients of output and log-sum-exp, float32.

        `bias` is an array over pairs, or of a bias by distance the slopes or the table.
        """
        random = np.random.default_rng(seed)
        by_distance = {"linear": (self.heads,), "buckets": (self.heads, BUCKETS)}
        bias = by_distance.get(self.distance_bias, self.bias)

        def draw(*shape):
            return random.normal(size=shape).astype(np.float32)

        return {
            "q": draw(2, self.queries, self.heads, self.head_dim),
            "k": draw(2, self.keys, self.kv_heads, self.head_dim),
            "v": draw(2, self.keys, self.kv_heads, self.value_dim),
            "bias": draw(*bias) if bias else None,
            "sinks": draw(self.heads) if self.sinks else None,
            "d_output": draw(2, self.queries, self.heads, self.value_dim),
            "d_lse": draw(2, self.queries, self.heads),
        }

    def seeds(self) -> np.ndarray:
        """Seeds of dropout, uint32."""
        shape = 2, self.heads, self.queries
        return np.random.default_rng(7).integers(0, 2**32, shape, dtype=np.uint32)

    def given(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arguments `bias`, `sinks` and `dropout` of attention."""
        bias = arrays["bias"]
        if self.distance_bias == "linear":
            bias = LinearBias(bias)
        elif self.distance_bias == "buckets":
            bias = BucketBias(bias, MAX_DISTANCE, bool(self.mask.get("causal")))
        dropout = Dropout(jnp.asarray(self.seeds()), self.dropout) if self.dropout else None
        return {"bias": bias, "sinks": arrays["sinks"], "dropout": dropout}

    def jax_mask(self) -> Mask:
        """The mask, lists as arrays."""
        fields = dict(self.mask)
        for name in ("query_segments", "key_segments", "query_ranks", "key_ranks"):
            if name in fields:
                fields[name] = jnp.asarray(fields[name])
        if isinstance(fields.get("offset"), np.ndarray):
            fields["offset"] = jnp.asarray(fields["offset"])
        return Mask(**fields)

    def visible(self, batch: int, query: int, key: int) -> bool:
        """Whether a query sees a key: the definition, pair by pair."""
        get = self.mask.get
        if get("query_segments") is not None:
            mine, other = get("query_segments")[batch][query], get("key_segments")[batch][key]
            if mine == 0 or mine != other:
                return False
        place, window = query + int(get("offset", 0)), get("window")
        if get("query_ranks") is not None:
            if get("key_ranks")[batch][key] > get("query_ranks")[batch][query]:
                return False
        elif get("causal"):
            return key <= place and (window is None or place - key < window)
        return window is None or abs(place - key) < window

    def visible_array(self) -> np.ndarray:
        """`visible` of all pairs, [batch query key]."""
        pairs = [
            [[self.visible(b, i, j) for j in range(self.keys)] for i in range(self.queries)]
            for b in range(2)
        ]
        return np.array(pairs)

    def bucket(self, query: int, key: int) -> int:
        """Number of the bucket of a pair's distance, as T5's paper has it, one by one."""
        distance, count, behind = key - query - int(self.mask.get("offset", 0)), BUCKETS, 0
        if not self.mask.get("causal"):
            count //= 2
            behind, distance = count * (distance > 0), -abs(distance)
        back, exact = max(-distance, 0), count // 2
        if back < exact:
            return behind + back
        growth = np.log(np.float32(back) / exact) / np.log(MAX_DISTANCE / exact)
        return behind + min(exact + int(growth * (count - exact)), count - 1)

    def dense_bias(self, given: np.ndarray | None) -> np.ndarray:
        """The bias of all pairs, [batch, heads, query, key]."""
        full = (2, self.heads, self.queries, self.keys)
        if given is None:
            return np.zeros(full)
        if not self.distance_bias:
            return np.broadcast_to(given, full).astype(np.float64)
        dense = np.zeros(full)
        for i, j in np.ndindex(full[2:]):
            distance = j - i - int(self.mask.get("offset", 0))
            linear = self.distance_bias == "linear"
            dense[:, :, i, j] = given * distance if linear else given[:, self.bucket(i, j)]
        return dense

    def bias_gradient(self, d_bias: np.ndarray) -> np.ndarray:
        """The gradient of what `arrays` calls bias."""
        if self.distance_bias == "linear":
            return np.zeros(self.heads)  # slopes are constants
        if self.distance_bias == "buckets":
            found = np.zeros((self.heads, BUCKETS))
            for i, j in np.ndindex(d_bias.shape[2:]):
                found[:, self.bucket(i, j)] += d_bias[:, :, i, j].sum(axis=0)
            return found
        wide = zip(self.bias, d_bias.shape)
        summed = tuple(axis for axis, (size, full) in enumerate(wide) if size == 1 != full)
        return d_bias.sum(axis=summed, keepdims=True)

    def drop_factors(self) -> np.ndarray:
        """What weights are multiplied by, [batch, heads, query, key]."""
        if not self.dropout:
            return np.ones((2, self.heads, self.queries, self.keys))
        x = self.seeds()[..., None].astype(np.uint64)
        x = x ^ (np.arange(self.keys, dtype=np.uint64) * 0x9E3779B9 % 2**32)
        x = (x ^ (x >> np.uint64(16))) * np.uint64(0x21F0AAAD) % np.uint64(2**32)
        x = (x ^ (x >> np.uint64(15))) * np.uint64(0xD35A2D97) % np.uint64(2**32)
        x = x ^ (x >> np.uint64(15))
        return np.where(x >= int(self.dropout * 2**32), 1 / (1 - self.dropout), 0.0)

    def expected(self, arrays: dict | None = None) -> dict[str, np.ndarray]:
        """Output, log-sum-exp and gradients of q, k, v, bias and sinks in float64, head by head."""
        arrays, visible = arrays or self.arrays(), self.visible_array()
        q, k, v, d_output, d_lse = (
            arrays[name].astype(np.float64) for name in ("q", "k", "v", "d_output", "d_lse")
        )
        bias, factors = self.dense_bias(arrays["bias"]), self.drop_factors()
        output, lse, d_bias = np.zeros(d_output.shape), np.zeros(d_lse.shape), np.zeros(bias.shape)
        d_q, d_k, d_v, d_sinks = (np.zeros(a.shape) for a in (q, k, v, np.zeros(self.heads)))
        for b, h in np.ndindex(2, self.heads):
            g = h // (self.heads // self.kv_heads)
            scores, gain = self.scale * q[b, :, h] @ k[b, :, g].T, 1.0
            if self.softcap is not None:
                scores = self.softcap * np.tanh(scores / self.softcap)
                gain = 1 - (scores / self.softcap) ** 2
            scores = scores + bias[b, h]
            weights = np.where(visible[b], np.exp(scores), 0.0)
            total = weights.sum(axis=1, keepdims=True)
            seen = total > 0
            sink = np.exp(np.float64(arrays["sinks"][h])) * seen if self.sinks else 0.0
            total = total + sink
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=seen)
            dropped = weights * factors[b, h]
            output[b, :, h] = dropped @ v[b, :, g]
            lse[b, :, h] = np.log(total, out=np.full_like(total, -np.inf), where=seen)[:, 0]
            d_weights = d_output[b, :, h] @ v[b, :, g].T * factors[b, h]
            # Of the derivative of the log of the sum of all exponentials.
            common = d_lse[b, :, h, None] - (weights * d_weights).sum(axis=1, keepdims=True)
            d_scores = weights * (d_weights + common)
            if self.sinks:
                share = np.divide(sink, total, out=np.zeros_like(total), where=seen)
                d_sinks[h] += (share * common).sum()
            d_bias[b, h] = d_scores
            d_scores = d_scores * gain
            d_q[b, :, h] = self.scale * d_scores @ k[b, :, g]
            d_k[b, :, g] += self.scale * d_scores.T @ q[b, :, h]
            d_v[b, :, g] += dropped.T @ d_output[b, :, h]
        result = {"output": output, "lse": lse, "q": d_q, "k": d_k, "v": d_v}
        if arrays["bias"] is not None:
            result["bias"] = self.bias_gradient(d_bias)
        if self.sinks:
            result["sinks"] = d_sinks
        return result


SEGMENTS = [[1] * 6 + [2] * 9 + [3] * 4 + [0] * 2, [0] * 3 + [4] * 7 + [1] * 11]
# The first 4 and 19 tokens see each other, what follows is causal.
PREFIX = [[0] * 4 + [*range(4, 21)], [0] * 19 + [19, 20]]
# Of each of the segments above a beginning sees itself whole.
PACKED = [
    [*[0] * 4, 4, 5, *[6] * 3, *range(9, 15), *[15] * 4, 0, 0],
    [*[0] * 3, *[3] * 7, *[10] * 2, *range(12, 21)],
]
PERMUTATION = [[5 * i % 21 for i in range(21)], [(8 * i + 3) % 21 for i in range(21)]]


def ranks(of: list[list[int]]) -> dict[str, list[list[int]]]:
    """The same ranks for queries and keys."""
    return {"query_ranks": of, "key_ranks": of}


CASES = [
    Case("full", {}, keys=30),
    Case("causal", {"causal": True}, queries=37, keys=37, heads=4),
    Case("causal_window", {"causal": True, "window": 5}, queries=37, keys=37),
    Case("window", {"window": 4}, value_dim=5),
    Case("prefix", {"causal": True, **ranks(PREFIX)}),
    Case(
        "segments",
        {"causal": True, "query_segments": SEGMENTS, "key_segments": SEGMENTS},
        heads=4,
        bias=(1, 4, 21, 21),
    ),
    Case(
        "segments_ranks",
        {
            "causal": True,
            **ranks(PACKED),
            "query_segments": SEGMENTS,
            "key_segments": SEGMENTS,
        },
        heads=4,
        bias=(1, 4, 21, 21),
    ),
    Case("permutation", {"causal": True, **ranks(PERMUTATION)}, heads=4),
    Case("permutation_window", {"causal": True, "window": 6, **ranks(PERMUTATION)}),
    Case(
        "ranks_of_others",  # as a token that is not to see itself, and on part of the queries
        {"causal": True, "query_ranks": [[r - 1 for r in row[9:]] for row in PERMUTATION]}
        | {"key_ranks": PERMUTATION, "offset": 9},
        queries=12,
    ),
    Case("grouped_bias", {"causal": True}, heads=6, bias=(2, 1, 1, 21)),
    Case("offset", {"causal": True, "offset": 9}, queries=12, bias=(1, 2, 12, 1)),
    Case(
        "traced_offset_window",
        {"causal": True, "window": 7, "offset": np.full((), 9, np.int32)},
        queries=12,
        heads=4,
    ),
    Case("rows_after_the_keys", {"causal": True, "window": 3, "offset": 12}),
    Case("softcap", {"causal": True, "window": 9}, heads=4, bias=(1, 4, 1, 21), softcap=0.7),
    Case("one_query", {"causal": True, "offset": 13}, queries=1, heads=4),
    Case("linear", {"causal": True, "offset": 3}, queries=18, heads=4, distance_bias="linear"),
    Case("buckets", {}, keys=30, heads=4, distance_bias="buckets"),
    Case(
        "causal_buckets",
        {"causal": True, "offset": np.full((), 2, np.int32)},
        queries=19,
        heads=4,
        distance_bias="buckets",
        softcap=2.0,
    ),
    Case("sinks", {"causal": True, "window": 3, "offset": 12}, heads=4, sinks=True),
    Case("dropout", {"causal": True, "window": 9}, heads=4, dropout=0.3),
    Case(
        "everything",
        {
            "causal": True,
            **ranks(PACKED),
            "query_segments": SEGMENTS,
            "key_segments": SEGMENTS,
        },
        heads=4,
        value_dim=5,
        distance_bias="buckets",
        sinks=True,
        dropout=0.2,
        softcap=1.5,
    ),
]


@pytest.fixture
def named_case():
    """One case by its name."""
    return {case.name: case for case in CASES}.__getitem__


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    """Every case in turn."""
    return request.param
