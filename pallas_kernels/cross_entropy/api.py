"""The public function: picks the implementation and, on a mesh, gives each device its share.

A z-loss follows from its log Z, label smoothing from log Z and the even mean of the logits, which
is linear in the hidden states and needs no logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy.reference import reference
from pallas_kernels.cross_entropy.table import IMPLEMENTATIONS, choose
from pallas_kernels.manual_axes import on_each_device


def implementations() -> tuple[str, ...]:
    """Names that `cross_entropy` takes as its implementation; later ones are preferred."""
    return "reference", *IMPLEMENTATIONS


def cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "rows embed"],
    targets: Int[Array, "batch seq"],
    *,
    vocabulary: int,
    scale: float = 1.0,
    softcap: float | None = None,
    largest: bool = False,
    mean: bool = False,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch seq"], ...]:
    """Negative log-likelihood in nats of each target under softmax(bend(scale * hidden head^T)).

    Products are accumulated, and everything after them computed, in float32. On a mesh with
    explicit axes `hidden` and `targets` may be sharded over batch and seq and `head` over its rows,
    each over axes of its own; no logits travel. A target that is no word (-1, say) has no
    likelihood to subtract: its entry of the first result equals that of the second.

    Args:
        vocabulary: number of words; rows of `head` from there on are padding and have no part.
        softcap: bends logits, softcap tanh(logits / softcap); None does not.
        largest: give the largest logit as well; its gradient goes to the word that has it.
        mean: give the mean logit under the softmax as well; log Z less it is the entropy in nats.
        chunk: tokens, on one device, whose logits "chunked" holds at a time; None holds all if they
            are few, else as many as fit 64 MiB. Held chunk by chunk, logits are computed again in
            the backward pass. Kernels hold none.
        implementation: one of `implementations()`; None takes the preferred one that can serve.

    Returns:
        Float32 arrays: -log p(target); log Z, the logarithm of the softmax's denominator; and, if
        asked for, each token's largest logit, then the mean logit.

    Raises:
        ValueError: a vocabulary that is not of the head, no such implementation, or one that cannot
            serve: with the reason.
    """
    _check(vocabulary, head.shape[0], implementation)
    bend = {"scale": scale, "softcap": softcap}
    if implementation == "reference":
        terms = reference(hidden, head, targets, vocabulary=vocabulary, **bend)
        return *terms[:2], *terms[2:3] * largest, *terms[3:] * mean

    chosen = choose(implementation, hidden, head, chunk, largest)
    spec, axes = PartitionSpec(*_spec(hidden)[:2]), _row_axes(head)

    def local(hidden, head, targets):
        first = jax.lax.axis_index(axes) * head.shape[0] if axes else 0
        how = {"largest": largest, "mean": mean, "chunk": chunk, **bend}
        found = chosen.serve(hidden, head, targets - first, words=vocabulary - first, **how)
        return _whole_terms(found, axes, largest, mean)

    explicit = jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    if spec == PartitionSpec(None, None) and not axes and not (chosen.kernel and explicit):
        return local(hidden, head, targets)
    # The types of a kernel's inside know nothing of mesh axes.
    checked, out_specs = not chosen.kernel, (spec,) * (2 + largest + mean)
    local = on_each_device(local, out_specs, check_vma=checked)
    return local(hidden, head, jax.reshard(targets, spec))


def _check(vocabulary: int, rows: int, implementation: str | None) -> None:
    """Raises the errors of `cross_entropy`, but that of an implementation that cannot serve."""
    if not 0 < vocabulary <= rows:
        raise ValueError(f"cross_entropy: vocabulary={vocabulary} of a head with {rows} rows")
    if implementation not in (None, *implementations()):
        raise ValueError(
            f"cross_entropy: implementation {implementation!r} is not one of "
            f"{', '.join(implementations())}"
        )


def _whole_terms(found, axes: tuple[str, ...], largest: bool, mean: bool):
    """The results of `cross_entropy`, from those of each device's rows of the head."""
    log_part, label, *more = found
    log_z = _combine(log_part, axes)
    label = jax.lax.psum(label, axes) if axes else label
    terms = [log_z - label, log_z]
    if largest:
        terms.append(_largest(more[0], axes))
    if mean:
        terms.append(_mean(more[-1], log_part - log_z, axes))
    return tuple(terms)


def _combine(log_part, axes: tuple[str, ...]):
    """log of the sum over the mesh axes of exp(log_part)."""
    if not axes:
        return log_part
    top = jax.lax.pmax(jax.lax.stop_gradient(log_part), axes)
    return top + jnp.log(jax.lax.psum(jnp.exp(log_part - top), axes))


def _largest(top, axes: tuple[str, ...]):
    """The largest over the mesh axes; gradients go to the shards that have it."""
    if not axes:
        return top
    mine = top == jax.lax.pmax(jax.lax.stop_gradient(top), axes)
    shards = jax.lax.psum(mine.astype(top.dtype), axes)
    return jax.lax.psum(jnp.where(mine, top, 0.0), axes) / shards


def _mean(mean, log_share, axes: tuple[str, ...]):
    """The mean over the mesh axes, each shard weighted by its share of the softmax."""
    return jax.lax.psum(jnp.exp(log_share) * mean, axes) if axes else mean


def _row_axes(head) -> tuple[str, ...]:
    """Mesh axes over which the head's rows are divided."""
    rows = _spec(head)[0]
    return rows if isinstance(rows, tuple) else () if rows is None else (rows,)


def _spec(array) -> tuple:
    """Mesh axes of each axis of an array, as far as its type has them."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))
