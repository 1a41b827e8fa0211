"""Attention on TPUs as a function with a gradient, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, BucketBias, DistanceBias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.table import Implementation, Request
from pallas_kernels.attention.tpu.backward import gradients
from pallas_kernels.attention.tpu.backward_blocks import backward_blocks
from pallas_kernels.attention.tpu.blocks import forward_blocks
from pallas_kernels.attention.tpu.forward import forward
from pallas_kernels.attention.tpu.lowering import Rules
from pallas_kernels.manual_axes import vary_alike, varying_axes
from pallas_kernels.pallas import pltpu
from pallas_kernels.target import target

LARGEST_HEAD = 512
SCALAR_BYTES = 2**19  # of the lists of tiles
TYPES = jnp.bfloat16, jnp.float16, jnp.float32


def tpu(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    mask: Mask,
    bias: Bias | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> (
    Float[Array, "batch query heads value_dim"]
    | tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch query heads"]]
):
    """Attention by the kernels for TPUs, of a request that they do not refuse.

    Products are in bfloat16 for bfloat16, else in float32 (in several passes of the matrix unit):
    TPUs have no products in float16, whose numbers bfloat16 would round.
    """
    dtype = q.dtype
    exact = jnp.promote_types(jnp.promote_types(dtype, k.dtype), v.dtype)
    exact = jnp.bfloat16 if exact == jnp.bfloat16 else jnp.float32
    q, k, v, mask, bias, dropout = vary_alike((q, k, v, mask, bias, dropout))
    device = target()
    rules = Rules(
        float(scale),
        softcap,
        mask.causal_by_position,
        mask.window,
        q.shape[1],
        k.shape[1],
        dropout.rate if dropout is not None else 0.0,
        device.kind,
        _interpreter(device.interpret, q),
    )
    q, k, v = (a.astype(exact) for a in (q, k, v))
    output, lse = _attend(rules, q, k, v, mask, bias, dropout)
    output = output.astype(dtype)
    return (output, lse) if return_lse else output


def _interpreter(interpret: Any, q: jax.Array) -> Any:
    """The `interpret` that Pallas is given.

    Inside of `jax.shard_map` the plain interpreter does not type its own numbers as varying; the
    one that simulates a TPU, which is slower, runs there.
    """
    return pltpu.InterpretParams() if interpret is True and varying_axes(q) else interpret


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules: Rules, q, k, v, mask: Mask, bias, dropout):
    return _forward(rules, q, k, v, mask, bias, dropout)[0]


def _forward(rules: Rules, q, k, v, mask: Mask, bias, dropout):
    blocks = forward_blocks(rules.kind, q, k, v, mask, _pair_bytes(bias))
    results = forward(rules, blocks, q, k, v, mask, bias, dropout)
    # A policy of `jax.checkpoint` that keeps the name does not run the kernel twice.
    output, lse = (checkpoint_name(a, "attention") for a in results)
    return (output, lse), (q, k, v, mask, bias, dropout, output, lse)


def _backward(rules: Rules, saved, cotangents):
    q, k, v, mask, bias, *_ = saved
    blocks = backward_blocks(rules.kind, q, k, v, mask, bias)
    d_q, d_k, d_v, d_bias = gradients(rules, blocks, *saved, *cotangents)
    if isinstance(bias, BucketBias):
        d_bias = dataclasses.replace(bias, table=d_bias)
    return d_q, d_k, d_v, None, d_bias, None


_attend.defvjp(_forward, _backward)


def _pair_bytes(bias: Bias | None) -> int:
    """Bytes that a pair has in an array of a bias, 0 if there is no number for each pair."""
    if bias is None or isinstance(bias, DistanceBias) or 1 in bias.shape[2:]:
        return 0
    return bias.dtype.itemsize


def refusal(request: Request) -> str | None:
    """Reason why the kernels for TPUs cannot serve, or None if they can."""
    device = target()
    if device.platform != "tpu":
        return f"it needs a TPU and the device is a {device.platform}"
    if device.kind in ("TPU v2", "TPU v3"):
        return f"the device is a {device.kind}, it takes TPU v4 and later ones"
    for name in "qkv":
        if (dtype := getattr(request, name).dtype) not in TYPES:
            return f"{name} of {dtype}, it takes bfloat16, float16 and float32"
    if (largest := max(request.q.shape[-1], request.v.shape[-1])) > LARGEST_HEAD:
        return f"heads of {largest} numbers, it takes up to {LARGEST_HEAD}"
    blocks = forward_blocks(
        device.kind, request.q, request.k, request.v, request.mask, _pair_bytes(request.bias)
    )
    batch, queries = request.q.shape[:2]
    lists = 1 if request.mask.query_segments is request.mask.query_ranks is None else batch
    tiles = lists * -(-queries // blocks.query) * -(-request.k.shape[1] // blocks.key)
    if 4 * tiles > SCALAR_BYTES:
        return (
            f"{tiles} tiles of masks ({lists} rows of {queries} queries and {request.k.shape[1]} "
            f"keys), it takes up to {SCALAR_BYTES // 4}: use fewer rows at a time, or shorter ones"
        )
    return None


IMPLEMENTATION = Implementation("tpu", tpu, refusal, returns_lse=True)
