"""Attention by cuDNN's fused kernel on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.table import Implementation, Request
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.target import target

LARGEST_HEAD = 128  # of every GPU that cuDNN's kernel serves; Hopper takes 256


def cudnn(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads head_dim"],
    mask: Mask,
    bias: None = None,
    *,
    scale: float,
    softcap: None = None,
    dropout: None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Attention by cuDNN, of a request that it does not refuse."""
    q, k, v = vary_alike((q, k, v))
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, implementation="cudnn", **arguments(mask)
    )


def refusal(request: Request) -> str | None:
    """Reason why cuDNN cannot serve, or None if it can."""
    if (platform := target().platform) != "gpu":
        return f"it needs an NVIDIA GPU and the device is a {platform}"
    asked = request.mask, request.bias, request.softcap, request.dropout
    return unsupported(request.q, request.k, request.v, *asked)


IMPLEMENTATION = Implementation("cudnn", cudnn, refusal)


def unsupported(q, k, v, mask: Mask, bias=None, softcap=None, dropout=None) -> str | None:
    """Part of the request that cuDNN cannot express, or None; asks no device."""
    if bias is not None:
        return "a bias (cuDNN has its gradient for some shapes only)"
    if softcap is not None:
        return "a softcap"
    if dropout is not None:
        return "dropout of attention weights"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype}, it takes bfloat16 and float16"
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if head_dim != value_dim or head_dim % 8 or head_dim > LARGEST_HEAD:
        return (
            f"head_dim {head_dim} with value_dim {value_dim}, it takes equal ones, a multiple of 8 "
            f"up to {LARGEST_HEAD}"
        )
    for field in ("query_ranks", "query_segments"):
        if getattr(mask, field) is not None:
            return f"a mask with {field}"
    if mask.causal or mask.window is not None:
        if not isinstance(mask.offset, int) or mask.offset != 0 or q.shape[1] != k.shape[1]:
            return "a causal or window mask with an offset, or unequal numbers of queries and keys"
        if not mask.causal:
            # Its window looks back only. An early version took (length, 0) and looked ahead.
            return "a window without causal=True"
    return None


def arguments(mask: Mask) -> dict[str, Any]:
    """A mask as the arguments of `jax.nn.dot_product_attention`, whose window leaves itself out."""
    window = None if mask.window is None else (mask.window - 1, 0)
    return {"is_causal": mask.causal, "local_window_size": window}
