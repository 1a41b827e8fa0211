"""The public function: checks the call and chooses the implementation that serves it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.api import with_sinks
from pallas_kernels.attention.bias import DistanceBias
from pallas_kernels.decode_attention.cache import CacheRows, KeyValueCache, PagedCache
from pallas_kernels.decode_attention.request import DecodeRequest
from pallas_kernels.table import Implementation, ImplementationTable

_table = ImplementationTable("decode_attention")


def register(implementation: Implementation) -> None:
    """Adds an implementation, which is preferred to those that are there already."""
    _table.register(implementation)


def implementations() -> tuple[str, ...]:
    """Names that `decode_attention` takes as its implementation; later ones are preferred."""
    return _table.names()


def decode_attention(
    q: Float[Array, "batch new heads head_dim"],
    cache: KeyValueCache,
    first: Int[Array, "batch"] | None = None,
    bias: DistanceBias | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    window: int | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> (
    Float[Array, "batch new heads value_dim"]
    | tuple[Float[Array, "batch new heads value_dim"], Float[Array, "batch new heads"]]
):
    """Attention of the newest tokens of each row to the row's tokens in a cache.

    softmax(bend(q k^T scale) + bias) v, where a query sees its own token and those before it. The
    cache holds the tokens of the queries already. Several new tokens a row check what a smaller
    model has guessed (speculative decoding, Leviathan et al. 2023, arXiv:2211.17192). It has no
    gradient. Arrays are local: on one device, or inside a `jax.shard_map`.

    Args:
        first: index in its row of the token of the first query; None: the last `new` tokens of the
            row are the queries. Queries past the row's end are padding and give zeros.
        bias: added to the scores, by the distance of the tokens.
        scale: of the scores, before the bias; None is head_dim**-0.5.
        softcap: bends scores, before the bias: softcap tanh(scores / softcap) (Gemma 2).
        sinks: a score of each head for a key without a value (gpt-oss, 2025).
        window: how many tokens a query sees, itself included; None is all of them.
        implementation: one of `implementations()`; None takes the preferred one that can serve.
        return_lse: whether to return (output, lse), as `pallas_kernels.attention.attention` does.

    Raises:
        ValueError: shapes that do not fit; lengths and page numbers that are outside of the cache
            (of concrete arrays; under `jax.jit` they are cut off, and nothing outside is read); or
            no implementation, or not the named one, can serve: with the reasons.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    check(q, cache, first, bias, sinks, window)
    if first is None:
        first = cache.lengths - q.shape[1]
    request = DecodeRequest(q, cache, first.astype(jnp.int32), bias, scale, softcap, window)
    output, lse = _table.choose(request, implementation).serve(**request.arguments())
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    return (output, lse) if return_lse else output


def preferred(
    q: Float[Array, "batch new heads head_dim"],
    cache: KeyValueCache,
    bias: DistanceBias | None = None,
    *,
    window: int | None = None,
) -> str:
    """Name of the implementation that a call with these arguments, or their types, takes."""
    request = DecodeRequest(q, cache, cache.lengths, bias, 1.0, None, window)
    return _table.choose(request, None).name


def check(q, cache, first, bias, sinks, window) -> None:
    """Raises ValueError for arrays that do not fit, and numbers in them that cannot be meant."""
    batch, new, heads, head_dim = q.shape
    keys, values = cache.keys.shape, cache.values.shape
    rank = 3 + (isinstance(cache, CacheRows) and cache.layer is not None)
    if len(keys) != rank or keys[:-1] != values[:-1]:
        form = "[pages, page, size]" if isinstance(cache, PagedCache) else "[batch, slots, size]"
        if rank == 4:
            form = "[layers, batch, slots, size]"
        raise ValueError(f"decode_attention: keys {keys} and values {values}, give both as {form}")
    kv_heads = max(keys[-1] // head_dim, 1)
    if keys[-1] % head_dim or heads % kv_heads or values[-1] % kv_heads:
        raise ValueError(
            f"decode_attention: {heads} query heads of {head_dim} for keys of {keys[-1]} numbers "
            f"and values of {values[-1]}: give keys of kv_heads * {head_dim}, with kv_heads a "
            f"divisor of {heads}, and values of kv_heads * value_dim"
        )
    table = getattr(cache, "page_table", None)
    rows = {"lengths": cache.lengths.shape[0]}
    rows |= {} if first is None else {"first": first.shape[0]}
    rows |= {"page_table": table.shape[0]} if table is not None else {"keys": keys[-3]}
    if wrong := {name: count for name, count in rows.items() if count != batch}:
        raise ValueError(f"decode_attention: {batch} rows of queries, but {wrong}")
    if new < 1:
        raise ValueError(f"decode_attention: no queries: {q.shape}")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window={window}, must be at least 1")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"decode_attention: sinks {sinks.shape} of {heads} query heads")
    if bias is not None and bias.num_heads != heads:
        raise ValueError(
            f"decode_attention: a bias of {bias.num_heads} heads for {heads} query heads"
        )
    _check_scales(cache, kv_heads)
    _check_numbers(cache, new, window)


def _check_scales(cache: KeyValueCache, kv_heads: int) -> None:
    scales = cache.key_scales, cache.value_scales
    int8 = [a.dtype == jnp.int8 for a in (cache.keys, cache.values)]
    if any(int8) != all(int8) or [a is not None for a in scales] != int8:
        raise ValueError(
            f"decode_attention: keys in {cache.keys.dtype} and values in {cache.values.dtype} with "
            f"{sum(a is not None for a in scales)} arrays of scales: give int8 and both scales, or "
            "another dtype and none"
        )
    shape = (*cache.keys.shape[:-2], kv_heads, cache.keys.shape[-2])
    if any(int8) and any(a.shape != shape for a in scales):
        raise ValueError(
            f"decode_attention: scales {scales[0].shape} and {scales[1].shape}, give {shape}"
        )


def _check_numbers(cache: KeyValueCache, new: int, window: int | None) -> None:
    """Looks at lengths and page numbers, where they are known."""
    if isinstance(cache.lengths, jax.core.Tracer):
        return
    lengths = np.asarray(cache.lengths)
    if (lengths < 0).any():
        raise ValueError(f"decode_attention: lengths below 0: {lengths[lengths < 0].tolist()}")
    if isinstance(cache, CacheRows):
        if (over := np.flatnonzero(lengths > cache.tokens)).size and (
            window is None or window + new - 1 > cache.tokens
        ):
            raise ValueError(
                f"decode_attention: row {over[0]} has {lengths[over[0]]} tokens, more than the "
                f"{cache.tokens} slots of a row: a ring needs a window, and window + new - 1 slots "
                f"at least, here window={window} and new={new}"
            )
        return
    if isinstance(cache.page_table, jax.core.Tracer):
        return
    pages, page, _ = cache.keys.shape
    if (over := np.flatnonzero(lengths > cache.tokens)).size:
        raise ValueError(
            f"decode_attention: row {over[0]} has {lengths[over[0]]} tokens, more than the "
            f"{cache.page_table.shape[1]} pages of {page} tokens of a row in the page table"
        )
    table = np.asarray(cache.page_table)
    read = np.arange(table.shape[1]) * page < lengths[:, None]
    if (bad := np.argwhere(read & ((table < 0) | (table >= pages)))).size:
        row, index = bad[0]
        raise ValueError(
            f"decode_attention: page_table[{row}, {index}] is {table[row, index]}, and the cache "
            f"has pages 0 to {pages - 1}; row {row} with {lengths[row]} tokens reads its first "
            f"{-(-int(lengths[row]) // page)} entries"
        )
