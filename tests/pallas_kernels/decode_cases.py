"""Calls of decode attention, and loops over tokens in float64 that they are checked against."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import BucketBias, LinearBias
from pallas_kernels.decode_attention import CacheRows, PagedCache


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """A call: row b has `lengths[b]` tokens, of which the last `new` are queries.

    `late` is by how many columns the queries of a row begin later than its last `new` tokens: so
    many of its columns are padding after its end.
    """

    lengths: tuple[int, ...]
    new: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int | None = None
    slots: int = 64
    page: int | None = None  # of a cache of pages
    layers: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: str | None = None
    int8: bool = False
    late: tuple[int, ...] | None = None
    dtype: Any = jnp.float32
    seed: int = 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Queries, keys and values of all tokens of all rows, and small parameters, in float64."""
        draw = np.random.default_rng(self.seed)
        batch, most = len(self.lengths), max(*self.lengths, 1)
        value_dim = self.value_dim or self.head_dim
        found = {
            "q": draw.normal(size=(batch, self.new, self.heads, self.head_dim)),
            "k": draw.normal(size=(batch, most, self.kv_heads, self.head_dim)),
            "v": draw.normal(size=(batch, most, self.kv_heads, value_dim)),
            "sinks": draw.normal(size=self.heads) + 1,
            "slopes": draw.uniform(0.01, 0.5, size=self.heads),
            "table": draw.normal(size=(self.heads, 8)),
        }
        rounded = {name: a.astype(self.dtype).astype(np.float64) for name, a in found.items()}
        if self.int8:
            for name in "kv":
                scales = np.float32(np.abs(rounded[name]).max(-1) / 127)
                rounded[f"{name}_scales"] = np.float64(scales)
                rounded[f"{name}_steps"] = np.round(rounded[name] / scales[..., None])
                rounded[name] = rounded[f"{name}_steps"] * scales[..., None]
        return rounded

    @property
    def first(self) -> np.ndarray:
        """Index of the first query of each row."""
        late = self.late or (0,) * len(self.lengths)
        return np.array(self.lengths) - self.new + np.array(late)

    def arguments(self) -> tuple[list, dict]:
        """What `decode_attention` takes; what no row holds is NaN."""
        arrays = self.arrays()
        cache = (self.paged if self.page else self.rows)(arrays)
        settings = {"window": self.window, "softcap": self.softcap, "scale": 0.3}
        if self.sinks:
            settings["sinks"] = jnp.asarray(np.float32(arrays["sinks"]))
        bias = None
        if self.bias == "linear":
            bias = LinearBias(jnp.asarray(np.float32(arrays["slopes"])))
        if self.bias == "buckets":
            bias = BucketBias(jnp.asarray(np.float32(arrays["table"])), 20, True)
        first = jnp.asarray(np.int32(self.first)) if self.late else None
        return [jnp.asarray(arrays["q"].astype(self.dtype)), cache, first, bias], settings

    def parts(self, arrays) -> dict[str, np.ndarray]:
        """Arrays of tokens [batch, token, ..] that go into the cache."""
        if not self.int8:
            return {"keys": arrays["k"], "values": arrays["v"]}
        names = {"keys": "k_steps", "values": "v_steps"}
        names |= {"key_scales": "k_scales", "value_scales": "v_scales"}
        return {name: arrays[key] for name, key in names.items()}

    def finish(self, name: str, filled: np.ndarray) -> jnp.ndarray:
        """An array [.., slots, kv_heads, (size)] as a cache holds it."""
        if "scales" in name:
            return jnp.asarray(np.float32(np.swapaxes(filled, -1, -2)))
        filled = filled.reshape(*filled.shape[:-2], -1)
        return (
            jnp.asarray(np.int8(np.nan_to_num(filled)))
            if self.int8
            else jnp.asarray(filled.astype(self.dtype))
        )

    def rows(self, arrays) -> CacheRows:
        """Token i in slot i modulo the slots."""
        found = {}
        for name, tokens in self.parts(arrays).items():
            filled = np.full((len(self.lengths), self.slots, *tokens.shape[2:]), np.nan)
            for row, length in enumerate(self.lengths):
                for token in range(length):
                    filled[row, token % self.slots] = tokens[row, token]
            if self.layers is not None:
                whole = np.full((self.layers, *filled.shape), np.nan)
                whole[1] = filled
                filled = whole
            found[name] = self.finish(name, filled)
        layer = None if self.layers is None else jnp.int32(1)
        return CacheRows(lengths=jnp.asarray(np.int32(self.lengths)), layer=layer, **found)

    def paged(self, arrays) -> PagedCache:
        """Pages in any order, with numbers outside of the cache where a row has no more pages."""
        draw = np.random.default_rng(self.seed + 1)
        needed = [-(-length // self.page) for length in self.lengths]
        pages = sum(needed) + 2
        order = list(draw.permutation(pages))
        table = np.full((len(self.lengths), self.slots // self.page), -7)
        for row, count in enumerate(needed):
            table[row, :count] = [order.pop() for _ in range(count)]
        found = {}
        for name, tokens in self.parts(arrays).items():
            filled = np.full((pages, self.page, *tokens.shape[2:]), np.nan)
            for row, length in enumerate(self.lengths):
                for token in range(length):
                    filled[table[row, token // self.page], token % self.page] = tokens[row, token]
            found[name] = self.finish(name, filled)
        lengths = jnp.array(self.lengths, jnp.int32)
        return PagedCache(page_table=jnp.asarray(table, jnp.int32), lengths=lengths, **found)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp by a loop over rows, queries and heads."""
        a = self.arrays()
        batch, new, heads, _ = a["q"].shape
        output = np.zeros((batch, new, heads, a["v"].shape[-1]))
        lse = np.full((batch, new, heads), -np.inf)
        for row, length in enumerate(self.lengths):
            for query in range(new):
                token = self.first[row] + query
                if token < 0 or token >= length:
                    continue
                begin = 0 if self.window is None else max(0, token - self.window + 1)
                for head in range(heads):
                    kv = head // (heads // self.kv_heads)
                    keys = a["k"][row, begin : token + 1, kv]
                    scores = 0.3 * keys @ a["q"][row, query, head]
                    if self.softcap:
                        scores = self.softcap * np.tanh(scores / self.softcap)
                    distances = token - np.arange(begin, token + 1)
                    if self.bias == "linear":
                        scores = scores - a["slopes"][head] * distances
                    if self.bias == "buckets":
                        scores = scores + a["table"][head, [bucket_of(d) for d in distances]]
                    held = list(scores) + ([a["sinks"][head]] if self.sinks else [])
                    lse[row, query, head] = top = np.logaddexp.reduce(held)
                    weights = np.exp(scores - top)
                    output[row, query, head] = weights @ a["v"][row, begin : token + 1, kv]
        return output, lse


def bucket_of(distance: int) -> int:
    """Bucket of T5 (arXiv:1910.10683, section 2.1) of a distance back: 8 of them, up to 20."""
    if distance < 4:
        return distance
    return min(7, 4 + int(math.log(distance / 4) / math.log(20 / 4) * 4))
