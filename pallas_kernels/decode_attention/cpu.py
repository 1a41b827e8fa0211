"""Decode attention on a CPU: of a few rows at a time, and of a few heads in one product."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.api import merge
from pallas_kernels.attention.bias import DistanceBias
from pallas_kernels.decode_attention.cache import KeyValueCache, PagedCache, gathered
from pallas_kernels.decode_attention.reference import normalised, softmax_terms
from pallas_kernels.decode_attention.request import DecodeRequest, seen
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.table import Implementation
from pallas_kernels.target import target

AT_ONCE = 512  # tokens of the cache that are read at once; copies of more leave a CPU's caches
OF_A_ROW = AT_ONCE // 2  # tokens of a row that are read at once where it has more: rows differ
WIDTH = 128  # numbers of keys side by side in a product


def decode(
    q: Float[Array, "batch one heads head_dim"],
    cache: KeyValueCache,
    first: Int[Array, "batch"],
    bias: DistanceBias | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Float[Array, "batch one heads value_dim"], Float[Array, "batch one heads"]]:
    """Attention of one token a row, in float32, of a few rows after the others.

    What is read of the cache for them stays in the processor's own caches until it is multiplied.
    Of the pages of long rows only those are read that have tokens which the row's query sees.
    """
    batch, settings = len(q), {"scale": scale, "softcap": softcap, "window": window}
    if isinstance(cache, PagedCache) and cache.tokens > OF_A_ROW:
        rows = (a[:, None] for a in (q, cache.page_table, cache.lengths, first))
        output, lse = jax.lax.map(
            lambda row: _decode_by_pages(cache, *row, bias, **settings), tuple(rows)
        )
        return output[:, 0], lse[:, 0]
    fitting = (n for n in range(2, batch + 1) if batch % n == 0 and n * cache.tokens <= AT_ONCE)
    rows = max(fitting, default=1)
    if rows == batch:
        return _decode_together(q, cache, first, bias, **settings)

    def part(begin: jax.Array) -> tuple[jax.Array, jax.Array]:
        queries, own_first = (jax.lax.dynamic_slice_in_dim(a, begin, rows) for a in (q, first))
        return _decode_together(queries, cache.part(begin, rows), own_first, bias, **settings)

    parts = jax.lax.map(part, jnp.arange(0, batch, rows))
    output, lse = (a.reshape(batch, *a.shape[2:]) for a in parts)
    return output, lse


def _decode_by_pages(
    cache: PagedCache,
    q: Float[Array, "1 one heads head_dim"],
    table: Int[Array, "1 row_pages"],
    length: Int[Array, "1"],
    first: Int[Array, "1"],
    bias: DistanceBias | None,
    **settings: float | int | None,
) -> tuple[Float[Array, "1 one heads value_dim"], Float[Array, "1 one heads"]]:
    """Attention of one row, of some of its pages after the others; see `decode`."""
    page = cache.keys.shape[1]
    pages = max(OF_A_ROW // page, 1)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))

    def add(index: jax.Array, before: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own = jax.lax.dynamic_slice_in_dim(table, index * pages, pages, axis=1)
        gone = index * pages * page  # tokens before; what counts is how far tokens are apart
        part = dataclasses.replace(cache, page_table=own, lengths=length - gone)
        return merge([before, _decode_together(q, part, first - gone, bias, **settings)])

    window, heads = settings["window"], q.shape[2]
    begin = jnp.maximum(first[0] + 1 - window, 0) if window is not None else 0
    value_dim = DecodeRequest(q, cache, first, bias, **settings).value_dim
    nothing = jnp.zeros((1, 1, heads, value_dim), q.dtype), jnp.full((1, 1, heads), -jnp.inf)
    end = -(-jnp.minimum(first[0] + 1, length[0]) // (pages * page))
    nothing = vary_alike(nothing, (q, cache, table, length, first, bias))
    return jax.lax.fori_loop(begin // (pages * page), end, add, nothing)


def _decode_together(
    q: Float[Array, "batch one heads head_dim"],
    cache: KeyValueCache,
    first: Int[Array, "batch"],
    bias: DistanceBias | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Float[Array, "batch one heads value_dim"], Float[Array, "batch one heads"]]:
    """Attention of one token of each row, of all of them together; see `decode`.

    The keys of some heads are side by side, as many as fill the vectors of a product. A query is as
    wide as these together, with zeros where the keys of other heads lie.
    """
    kv_heads = DecodeRequest(q, cache, first, bias, scale, softcap, window).kv_heads
    batch, _, heads, head_dim = q.shape
    enough = (n for n in range(1, kv_heads) if kv_heads % n == 0 and n * head_dim >= WIDTH)
    beside = min(enough, default=kv_heads)
    groups, each = kv_heads // beside, heads // kv_heads
    k, v = (
        jnp.swapaxes(a.astype(jnp.float32).reshape(batch, cache.tokens, groups, -1), 1, 2)
        for a in gathered(cache, kv_heads)
    )
    own = jnp.repeat(jnp.eye(beside), each, axis=0)[..., None]  # of a group's queries its keys
    query = q.astype(jnp.float32).reshape(batch, groups, beside * each, 1, head_dim)
    wide = jnp.swapaxes((query * own).reshape(batch, groups, beside * each, -1), 2, 3)
    # The keys are the first factor: XLA would copy the second one into another order.
    scores = scale * jnp.einsum("bgsd,bgdh->bgsh", k, wide)
    scores = jnp.swapaxes(scores, 2, 3).reshape(batch, kv_heads, each, 1, -1)
    visible = seen(cache, first, 1, window)
    weights, top, total = softmax_terms(scores, visible, cache, first, bias, softcap)
    weights = weights.reshape(batch, groups, beside * each, -1)
    # A slot that no query sees has weight 0, but may hold what is no number.
    v = jnp.where(visible[..., None], v, 0)
    wide = jnp.einsum("bghs,bgsd->bghd", weights, v)
    wide = wide.reshape(batch, groups, beside * each, beside, -1)
    output = jnp.sum(wide * own, axis=3).reshape(batch, kv_heads, each, 1, -1)
    return normalised(output, top, total, q.dtype)


def refusal(request: DecodeRequest) -> str | None:
    """Reason why it cannot serve, or None if it can."""
    if (platform := target().platform) != "cpu":
        return f"it needs a CPU and the device is a {platform}"
    if (new := request.q.shape[1]) != 1:
        return f"it takes one new token a row, not {new}"
    return None


IMPLEMENTATION = Implementation("cpu", decode, refusal, returns_lse=True)
