"""The kernels as one differentiable function, and the arrays that they read."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import BucketBias, LinearBias, bucket
from pallas_kernels.attention.chunked import chunked
from pallas_kernels.attention.hopper.backward import key_gradients, query_gradients
from pallas_kernels.attention.hopper.forward import COMPUTING, forward
from pallas_kernels.attention.hopper.lists import by_keys, by_queries
from pallas_kernels.attention.hopper.pairs import LOG2E
from pallas_kernels.attention.hopper.plan import KernelPlan, columns, padded
from pallas_kernels.attention.mask import Mask
from pallas_kernels.manual_axes import vary_alike

HALF = 64  # the least columns of a part
UNSEEN = 1e30  # log-sum-exp of rows whose weights are to be zero


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: KernelPlan, q, k, v, mask: Mask, bias, dropout
) -> tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]:
    """Attention of arrays whose heads have sizes that the kernels take, and log-sum-exp."""
    return _forward(plan, q, k, v, mask, bias, dropout)[0]


def _forward(plan: KernelPlan, q, k, v, mask: Mask, bias, dropout):
    sizes = COMPUTING * plan.blocks.rows, plan.blocks.forward_keys
    lists = by_queries(mask, plan.query_length, plan.key_length, *sizes)
    queries, keys, values = (pad(a, 1, size) for a, size in zip((q, k, v), (*sizes, sizes[1])))
    inputs = _inputs(plan, mask, bias, dropout, *sizes)
    lists, inputs = vary_alike((lists, inputs), like=q)
    output, lse = forward(plan, queries, keys, values, lists, inputs)
    output = output[:, : plan.query_length]
    lse = jnp.swapaxes(lse[:, :, : plan.query_length], 1, 2)
    output, lse = (checkpoint_name(a, "attention") for a in (output, lse))
    return (output, lse), (q, k, v, mask, bias, dropout, output, lse)


def _backward(plan: KernelPlan, saved, cotangents):
    q, k, v, mask, bias, dropout, output, lse = saved
    d_output, d_lse = cotangents
    delta = jnp.sum(output.astype(jnp.float32) * d_output.astype(jnp.float32), axis=-1) - d_lse
    rows = jnp.where(jnp.isfinite(lse), lse * LOG2E, UNSEEN), delta
    rows = tuple(jnp.swapaxes(a, 1, 2) for a in rows)
    arguments = plan, (q, k, v, d_output), rows, mask, bias, dropout
    d_q = _query_gradients(*arguments)
    d_k, d_v = _key_gradients(*arguments)
    d_bias = _bias_gradient(plan, saved, cotangents)
    return d_q, d_k, d_v, None, d_bias, None


attend.defvjp(_forward, _backward)


def _query_gradients(plan: KernelPlan, arrays, rows, mask, bias, dropout):
    sizes = COMPUTING * plan.blocks.rows, plan.blocks.query_gradient_keys
    lists = by_queries(mask, plan.query_length, plan.key_length, *sizes)
    inputs = _inputs(plan, mask, bias, dropout, *sizes)
    arrays, rows = _padded(arrays, rows, *sizes)
    lists, inputs = vary_alike((lists, inputs), like=arrays[0])
    return query_gradients(plan, *arrays, *rows, lists, inputs)[:, : plan.query_length]


def _key_gradients(plan: KernelPlan, arrays, rows, mask, bias, dropout):
    widths = arrays[0].shape[-1], arrays[2].shape[-1]
    parts = columns(*widths)
    sizes = plan.blocks.key_gradient_queries, COMPUTING // parts * plan.blocks.rows
    lists = by_keys(mask, plan.query_length, plan.key_length, *sizes)
    inputs = _inputs(plan, mask, bias, dropout, *sizes)
    if "bias" in inputs:
        inputs["bias"] = jnp.swapaxes(inputs["bias"], 2, 3)
    arrays, rows = _padded(arrays, rows, *sizes)
    arrays = tuple(pad(a, 3, HALF * parts) if parts > 1 else a for a in arrays)
    lists, inputs = vary_alike((lists, inputs), like=arrays[0])
    results = key_gradients(plan, parts, *arrays, *rows, lists, inputs)
    return tuple(a[:, : plan.key_length, :, :width] for a, width in zip(results, widths))


def _padded(arrays, rows, query_block: int, key_block: int):
    """Arrays in whole blocks; rows that were added have weights of zero."""
    q, k, v, d_output = arrays
    q, d_output = (pad(a, 1, query_block) for a in (q, d_output))
    k, v = (pad(a, 1, key_block) for a in (k, v))
    lse, delta = rows
    lse = pad(lse, 2, query_block, constant_values=UNSEEN)
    return (q, k, v, d_output), (lse, pad(delta, 2, query_block))


def _bias_gradient(plan: KernelPlan, saved, cotangents):
    """That of an array or table, in plain XLA, which leaves it out where nothing asks for it."""
    q, k, v, mask, bias, dropout, _, _ = saved
    if bias is None or isinstance(bias, LinearBias):
        return None
    static = {"scale": plan.scale, "softcap": plan.softcap, "dropout": dropout}

    def of(bias):
        return chunked(q, k, v, mask, bias, **static, return_lse=True)

    return jax.vjp(of, bias)[1](cotangents)[0]


def _inputs(plan: KernelPlan, mask: Mask, bias, dropout, query_block: int, key_block: int) -> dict:
    """Arrays of mask, bias and dropout by name, padded to whole blocks."""
    whole = mask.mapped(
        lambda a: pad(jnp.asarray(a, jnp.int32), 1, query_block, mode="edge"),
        lambda a: pad(jnp.asarray(a, jnp.int32), 1, key_block, mode="edge"),
    )
    names = ("query_segments", "key_segments", "query_ranks", "key_ranks")
    inputs: dict[str, Any] = {name: getattr(whole, name) for name in names}
    if plan.offset is None:
        inputs["offset"] = jnp.asarray(mask.offset, jnp.int32)[None]
    if dropout is not None:
        inputs["seeds"] = pad(dropout.seeds, 2, query_block)
    if isinstance(bias, LinearBias):
        inputs["slopes"] = jnp.asarray(bias.slopes, jnp.float32) * LOG2E
    elif isinstance(bias, BucketBias):
        inputs |= _steps(plan, mask, bias)
    elif bias is not None:
        for axis, block in ((2, query_block), (3, key_block)):
            bias = pad(bias, axis, block) if bias.shape[axis] > 1 else bias
        inputs["bias"] = bias.astype(jnp.float32)
    return {name: array for name, array in inputs.items() if array is not None}


def _steps(plan: KernelPlan, mask: Mask, bias: BucketBias) -> dict[str, jax.Array]:
    """A bias by buckets as a function that is constant between a few distances.

    `step_at` has the number of the step of every distance, the least first; `starts` their least
    distances; `steps` [heads, steps, 2] their values and what they are above the step before.
    """
    number = bias.table.shape[1] + 1
    lowest = -(plan.query_length - 1) - mask.offset
    distances = lowest + jnp.arange(plan.query_length + plan.key_length - 1, dtype=jnp.int32)
    buckets = bucket(distances, bias.table.shape[1], bias.max_distance, bias.causal)
    changes = jnp.concatenate([jnp.zeros(1, bool), buckets[1:] != buckets[:-1]])
    at = jnp.cumsum(changes.astype(jnp.int32))
    firsts = jnp.searchsorted(at, jnp.arange(number, dtype=jnp.int32))
    firsts = jnp.minimum(firsts, distances.shape[0] - 1)
    values = bias.table.astype(jnp.float32)[:, buckets[firsts]] * LOG2E
    rises = jnp.diff(values, axis=1, prepend=0.0)
    return {
        "step_at": at,
        "starts": distances[firsts],
        "steps": jnp.stack([values, rises], axis=-1),
    }


def pad(a, axis: int, multiple: int, **how):
    """`a` with so many more numbers on an axis that its size is a multiple."""
    more = padded(a.shape[axis], multiple) - a.shape[axis]
    widths = [(0, more if at == axis else 0) for at in range(a.ndim)]
    return jnp.pad(a, widths, **how) if more else a
