"""Cross-entropy on Hopper GPUs by kernels that hold no logits.

The forward pass writes a few sums for each tile of 128 rows of the head. The backward pass makes
the logits again, part by part of the head, and writes their gradients in 16 bits; the two products
that follow are cuBLAS's. An accumulator of a gradient as wide as hidden fits no shared memory, and
atomic sums would not be in the same order twice.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy import hopper_kernels as kernels
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.target import target

LN2 = math.log(2)
PART_BYTES = 2**26  # of the gradients of logits held at a time
KINDS = "H100", "H200", "GH200", "H800", "H20"


def refusal(hidden, head, largest: bool = False) -> str | None:
    """Reason why the kernels cannot serve, or None if they can."""
    device = target()
    if device.platform != "gpu":
        return f"it needs a Hopper GPU and the device is a {device.platform}"
    if not any(kind in device.kind.replace("-", " ").split() for kind in KINDS):
        return f"it needs a Hopper GPU and the device is a {device.kind}"
    # The interpreter computes what the chip has no instruction for, which tests compare exactly.
    known = (jnp.bfloat16, jnp.float16, *[jnp.float32] * bool(device.interpret))
    if hidden.dtype != head.dtype or hidden.dtype not in known:
        return f"dtypes {hidden.dtype} and {head.dtype}, it takes two of bfloat16 or of float16"
    if largest:
        return "the largest logit: its gradient needs the row, which it does not keep"
    return None


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
    chunk: None = None,
) -> tuple[Float[Array, "batch seq"], ...]:
    """Contribution of a head's rows to the loss of each token, as `chunked.vocabulary_terms`."""
    words = jnp.minimum(jnp.asarray(words, jnp.int32), head.shape[0])
    hidden, head, targets, words = vary_alike((hidden, head, targets, words))
    shape, tokens = targets.shape, targets.size
    # Tiles have rows that the head has not: a target there is of another shard.
    targets = jnp.where(targets < words, targets, -1).reshape(tokens)
    hidden = _pad(hidden.reshape(tokens, -1), kernels.COMPUTING * kernels.TOKENS, kernels.WIDTH)
    targets = jnp.pad(targets, (0, hidden.shape[0] - tokens), constant_values=-1)
    part = _part(*hidden.shape[:1], head.shape[0], hidden.dtype.itemsize)
    head = _pad(head, part, kernels.WIDTH)
    request = kernels.TileRequest(scale, softcap, mean, target().interpret)
    terms = _terms((request, part), hidden, head, targets, words.reshape(1))
    return tuple(term[:tokens].reshape(shape) for term in terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _terms(static, hidden, head, targets, words):
    return _forward(static, hidden, head, targets, words)[0]


def _forward(static, hidden, head, targets, words):
    request, _ = static
    found = kernels.sums(request, hidden, head, targets, words)
    top = jnp.max(found[0], axis=0)
    shares = jnp.exp2(found[0] - top)
    total = jnp.sum(shares * found[1], axis=0)
    log_part = top + jnp.log2(total)
    terms = [log_part, jnp.sum(found[2], axis=0)]
    if request.mean:
        terms.append(jnp.sum(shares * found[3], axis=0) / total)
    saved = hidden, head, targets, words, log_part, terms[-1]
    return tuple(LN2 * term for term in terms), saved


def _backward(static, saved, d_terms):
    hidden, head, targets, words, log_part, mean = saved
    request, part = static
    d_log_part, d_label, *d_mean = d_terms
    share, slope = d_log_part, jnp.zeros_like(d_log_part)
    if request.mean:
        share, slope = share + d_mean[0] * (1 - LN2 * mean), LN2 * d_mean[0]
    factors = [request.scale * factor for factor in (share, d_label, slope)]
    factors = jnp.stack([log_part, *factors])

    def one(d_hidden, given):
        rows, first = given
        own = targets - first
        d_logits = kernels.gradients(request, hidden, rows, own, words - first, factors)
        d_rows = _product("tv,td->vd", d_logits, hidden)
        d_hidden += _product("tv,vd->td", d_logits, rows)
        return d_hidden, d_rows.astype(head.dtype)

    zeros = vary_alike(jnp.zeros(hidden.shape, jnp.float32), like=hidden)
    parts = head.reshape(-1, part, head.shape[1])
    firsts = part * jnp.arange(parts.shape[0], dtype=jnp.int32)
    d_hidden, d_head = jax.lax.scan(one, zeros, (parts, firsts))
    return d_hidden.astype(hidden.dtype), d_head.reshape(head.shape), None, None


_terms.defvjp(_forward, _backward)


def _product(axes: str, one, other):
    return jnp.einsum(axes, one, other, preferred_element_type=jnp.float32)


def _part(tokens: int, rows: int, itemsize: int) -> int:
    """Rows of the head at a time, a multiple of a tile's."""
    count = -(-rows * tokens * itemsize // PART_BYTES)
    return kernels.ROWS * -(-rows // (count * kernels.ROWS))


def _pad(array, *multiples: int):
    """The array with zeros after its ends, up to multiples."""
    more = [(0, -size % multiple) for size, multiple in zip(array.shape, multiples)]
    return jnp.pad(array, more) if any(after for _, after in more) else array
