"""The public function: checks the request and chooses who serves it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, DistanceBias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.table import Request, choose


def attention(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> (
    Float[Array, "batch query heads value_dim"]
    | tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]
):
    """softmax(bend(q k^T scale) + bias) v over the pairs that the mask allows.

    Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1). Query head h
    reads key head h // (heads // kv_heads) (Ainslie et al. 2023, arXiv:2305.13245). The softmax is
    in float32, the result in q's dtype. Rows that see nothing give zeros, and forbidden pairs get
    gradients of exactly zero. Arrays are local: on one device, or inside a `jax.shard_map`. To
    implementations the branches of a mask are rows of their own, with the keys that all share.

    Args:
        bias: added to the scores: an array over pairs, or a `DistanceBias` of few parameters.
        scale: of the scores, before the bias; None is head_dim**-0.5.
        softcap: bends scores, before the bias: softcap tanh(scores / softcap) (Gemma 2); None does
            not.
        sinks: a score of each head for a key without a value, which every query sees that sees any
            (gpt-oss, 2025).
        dropout: zeroes weights and raises the others to match.
        implementation: one of `implementations()`; None takes the preferred one that can serve.
        return_lse: whether to return (output, lse): the log of the sum of each query's exponentials
            in float32, -inf where it sees nothing. `merge` puts attention to parts of the keys
            together by it.

    Raises:
        ValueError: shapes that do not fit, or no implementation, or not the named one, can serve:
            with the reasons.
    """
    _check(q, k, v, bias, sinks, dropout)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if mask.branches is not None:
        if bias is not None or dropout is not None:
            raise ValueError("attention: branches of a row have neither a bias nor dropout")
        settings = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse}
        run = functools.partial(attention, implementation=implementation, **settings)
        return _by_branch(run, q, k, v, mask)
    with_lse = return_lse or sinks is not None
    request = Request(q, k, v, mask, bias, scale, softcap, dropout, with_lse)
    result = choose(request, implementation).serve(**request.arguments())
    if sinks is None:
        return result
    output, lse = with_sinks(*result, sinks)
    return (output, lse) if return_lse else output


def _by_branch(run, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask):
    """Attention of the shared positions of each row, then of its branches, by `run`."""
    batch, length = q.shape[:2]
    shared, branch = mask.branches
    count, rest = divmod(length - shared, branch)
    if rest or k.shape[1] != length or not isinstance(mask.offset, int) or mask.offset:
        raise ValueError(
            f"attention: {length} queries and {k.shape[1]} keys, of which {shared} are shared, are "
            f"no whole branches of {branch}"
        )
    plain = dataclasses.replace(mask, branches=None)

    def first(a: jax.Array) -> jax.Array:
        return a[:, :shared]

    def apart(a: jax.Array) -> jax.Array:
        return a[:, shared:].reshape(batch * count, branch, *a.shape[2:])

    def behind(a: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.repeat(first(a), count, axis=0), apart(a)], axis=1)

    own = dataclasses.replace(plain.mapped(apart, behind), offset=shared)
    found = run(apart(q), behind(k), behind(v), own)
    found = jax.tree.map(lambda a: a.reshape(batch, count * branch, *a.shape[2:]), found)
    if not shared:
        return found
    before = run(first(q), first(k), first(v), plain.mapped(first, first))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), before, found)


def with_sinks(
    output: Float[Array, "batch query heads value_dim"],
    lse: Float[Array, "batch query heads"],
    sinks: Float[Array, "heads"],
) -> tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]:
    """Attention with one more score a head in the denominator of the softmax."""
    seen = jnp.isfinite(lse)  # else nothing is: the gradients of infinities are no numbers
    lse = jnp.where(seen, lse, 0.0)
    total = jnp.logaddexp(lse, sinks.astype(lse.dtype))
    share = jnp.exp(lse - total)
    output = (output.astype(lse.dtype) * share[..., None]).astype(output.dtype)
    return output, jnp.where(seen, total, -jnp.inf)


def merge(
    parts: Sequence[
        tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]
    ],
) -> tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]:
    """Attention to all keys from attention to parts of them, each as (output, lse).

    output = sum over parts of exp(lse_i - lse) output_i, with lse the log of the sum of exp(lse_i)
    (Milakov and Gimelshein 2018, arXiv:1805.02867).
    """
    outputs, lses = (jnp.stack(arrays) for arrays in zip(*parts, strict=True))
    # Of a row that sees nothing all are -inf, whose differences are no numbers.
    seen = jnp.any(jnp.isfinite(lses), axis=0)
    lse = jax.nn.logsumexp(jnp.where(seen, lses, 0.0), axis=0)
    shares = jnp.where(seen, jnp.exp(lses - lse), 0.0)
    merged = jnp.sum(shares[..., None] * outputs.astype(lse.dtype), axis=0)
    return merged.astype(outputs.dtype), jnp.where(seen, lse, -jnp.inf)


def _check(q, k, v, bias, sinks, dropout) -> None:
    batch, query_length, heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "attention: q [batch query heads head_dim], k [batch key kv_heads head_dim] and "
            f"v [batch key kv_heads value_dim] do not fit: {q.shape}, {k.shape}, {v.shape}"
        )
    if heads % k.shape[2]:
        raise ValueError(
            f"attention: {heads} query heads are no multiple of {k.shape[2]} key heads"
        )
    if 0 in (query_length, k.shape[1]):
        raise ValueError(f"attention: no queries or no keys: {q.shape}, {k.shape}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"attention: sinks {sinks.shape} of {heads} query heads")
    if dropout is not None and dropout.seeds.shape != (batch, heads, query_length):
        raise ValueError(
            f"attention: seeds {dropout.seeds.shape} of dropout for rows of weights "
            f"{(batch, heads, query_length)}"
        )
    if isinstance(bias, DistanceBias):
        if bias.num_heads != heads:
            raise ValueError(f"attention: a bias of {bias.num_heads} heads for {heads} query heads")
        return
    if bias is None:
        return
    full = (batch, heads, query_length, k.shape[1])
    if bias.ndim != 4 or any(b not in (1, f) for b, f in zip(bias.shape, full)):
        raise ValueError(f"attention: bias {bias.shape} does not broadcast to {full}")
