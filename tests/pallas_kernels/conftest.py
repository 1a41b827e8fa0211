"""Cases that every implementation of attention runs, and attention in numpy float64 beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask


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

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray | None]:
        """q, k, v, bias and the gradient of the output, float32."""
        random = np.random.default_rng(seed)

        def draw(*shape):
            return random.normal(size=shape).astype(np.float32)

        return {
            "q": draw(2, self.queries, self.heads, self.head_dim),
            "k": draw(2, self.keys, self.kv_heads, self.head_dim),
            "v": draw(2, self.keys, self.kv_heads, self.value_dim),
            "bias": draw(*self.bias) if self.bias else None,
            "d_output": draw(2, self.queries, self.heads, self.value_dim),
        }

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

    def expected(self, arrays: dict | None = None) -> dict[str, np.ndarray]:
        """Output and gradients of q, k, v and bias in float64, by the formulas, head by head."""
        arrays, visible = arrays or self.arrays(), self.visible_array()
        q, k, v, d_output = (
            arrays[name].astype(np.float64) for name in ("q", "k", "v", "d_output")
        )
        full = (2, self.heads, self.queries, self.keys)
        bias = np.zeros(full) if arrays["bias"] is None else np.broadcast_to(arrays["bias"], full)
        output, d_bias = np.zeros(d_output.shape), np.zeros(full)
        d_q, d_k, d_v = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
        for b, h in np.ndindex(2, self.heads):
            g = h // (self.heads // self.kv_heads)
            scores, gain = self.scale * q[b, :, h] @ k[b, :, g].T, 1.0
            if self.softcap is not None:
                scores = self.softcap * np.tanh(scores / self.softcap)
                gain = 1 - (scores / self.softcap) ** 2
            scores = scores + bias[b, h]
            weights = np.where(visible[b], np.exp(scores), 0.0)
            total = weights.sum(axis=1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            output[b, :, h] = weights @ v[b, :, g]
            d_weights = d_output[b, :, h] @ v[b, :, g].T
            d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
            d_bias[b, h] = d_scores
            d_scores = d_scores * gain
            d_q[b, :, h] = self.scale * d_scores @ k[b, :, g]
            d_k[b, :, g] += self.scale * d_scores.T @ q[b, :, h]
            d_v[b, :, g] += weights.T @ d_output[b, :, h]
        result = {"output": output, "q": d_q, "k": d_k, "v": d_v}
        if self.bias:
            summed = tuple(axis for axis, size in enumerate(self.bias) if size == 1 != full[axis])
            result["bias"] = d_bias.sum(axis=summed, keepdims=True)
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
]


@pytest.fixture
def named_case():
    """One case by its name."""
    return {case.name: case for case in CASES}.__getitem__


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    """Every case in turn."""
    return request.param
