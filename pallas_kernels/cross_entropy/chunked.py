"""Cross-entropy over chunks of tokens, each one's logits made, reduced and forgotten."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.softcap import softcap_scores

CHUNK_BYTES = 2**26  # of the logits held at a time
PADDING = -1e30  # logit of a row that is no word: its exponential is exactly zero
Static = tuple[float, float | None, bool, bool]  # scale, softcap, largest, mean


def vocabulary_terms(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "rows embed"],
    targets: Int[Array, "batch seq"],
    *,
    words: int | Int[Array, ""],
    scale: float,
    softcap: float | None = None,
    largest: bool = False,
    mean: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Array, "batch seq"], ...]:
    """Contribution of a head's rows, or of one shard of them, to the loss of each token.

    Args:
        targets: row of the target; one that is not among the rows contributes nothing.
        words: rows from there on are padding.
        largest: give the largest logit as well.
        mean: give the mean logit under the softmax of these rows as well.
        chunk: tokens at a time.

    Returns:
        log of the sum of the exponentials of the logits, the target's logit or 0, and, if asked
        for, the largest logit and the mean; float32.
    """
    hidden, head, targets, words = vary_alike((hidden, head, targets, jnp.asarray(words)))
    static = scale, softcap, largest, mean
    shape, embed = targets.shape, hidden.shape[-1]
    hidden, targets = hidden.reshape(-1, embed), targets.reshape(-1)
    tokens = hidden.shape[0]
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (4 * head.shape[0]))
    if chunk >= tokens:
        terms = _reduce(_logits(hidden, head, words, static)[0], targets, static)
        return tuple(term.reshape(shape) for term in terms)
    chunks = -(-tokens // chunk)
    chunk = -(-tokens // chunks)  # as even as they can be
    more = chunks * chunk - tokens
    hidden = jnp.pad(hidden, ((0, more), (0, 0))).reshape(chunks, chunk, embed)
    targets = jnp.pad(targets, (0, more)).reshape(chunks, chunk)
    terms = _chunked(static, hidden, head, targets, words)
    return tuple(term.reshape(-1)[:tokens].reshape(shape) for term in terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static: Static, hidden, head, targets, words):
    def one(chunk):
        hidden, targets = chunk
        return _reduce(_logits(hidden, head, words, static)[0], targets, static)

    return jax.lax.map(one, (hidden, targets))


def _forward(static, hidden, head, targets, words):
    terms = _chunked(static, hidden, head, targets, words)
    return terms, (hidden, head, targets, words, terms[0], terms[2:])


def _backward(static, saved, d_terms):
    hidden, head, targets, words, log_part, more = saved
    scale, _, largest, mean = static

    def one(d_head, chunk):
        hidden, targets, log_part, more, (d_log_part, d_label, *d_more) = chunk
        logits, gain = _logits(hidden, head, words, static)
        share = jnp.exp(logits - log_part[:, None])
        d_logits = share * d_log_part[:, None] + _hit(targets, head.shape[0]) * d_label[:, None]
        if largest:
            d_logits += (logits == more[0][:, None]) * d_more[0][:, None]
        if mean:
            d_logits += share * (1 + logits - more[-1][:, None]) * d_more[-1][:, None]
        if gain is not None:
            d_logits *= gain
        d_logits = (scale * d_logits).astype(hidden.dtype)
        d_head += jnp.einsum("tv,td->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("tv,vd->td", d_logits, head, preferred_element_type=jnp.float32)
        return d_head, d_hidden.astype(hidden.dtype)

    zeros = vary_alike(jnp.zeros_like(head, jnp.float32), like=head)
    chunks = (hidden, targets, log_part, more, d_terms)
    d_head, d_hidden = jax.lax.scan(one, zeros, chunks)
    return d_hidden, d_head.astype(head.dtype), None, None


_chunked.defvjp(_forward, _backward)


def _logits(hidden, head, words, static: Static):
    """Logits of every row, those of the padding at PADDING, and the derivative of `bend`."""
    scale, softcap, *_ = static
    logits = scale * jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    logits, gain = softcap_scores(logits, softcap)
    rows = jax.lax.broadcasted_iota(jnp.int32, (1, head.shape[0]), 1)
    return jnp.where(rows < words, logits, PADDING), gain


def _reduce(logits, targets, static: Static):
    _, _, largest, mean = static
    label = jnp.sum(jnp.where(_hit(targets, logits.shape[1]), logits, 0.0), axis=-1)
    terms = [jax.nn.logsumexp(logits, axis=-1), label]
    if largest:
        terms.append(jnp.max(logits, axis=-1))
    if mean:
        terms.append(jnp.sum(jnp.exp(logits - terms[0][:, None]) * logits, axis=-1))
    return tuple(terms)


def _hit(targets, rows: int):
    """One-hot rows of the head at each token's target."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1) == targets[:, None]
