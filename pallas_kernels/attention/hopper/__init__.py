"""Flash attention on Hopper GPUs in Pallas Mosaic GPU: block-sparse, exact, deterministic."""

from __future__ import annotations

import re

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.bias import Bias, BucketBias, DistanceBias, LinearBias
from pallas_kernels.attention.dropout import Dropout
from pallas_kernels.attention.hopper.gradient import attend, pad
from pallas_kernels.attention.hopper.plan import KernelPlan, default_blocks
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.table import Implementation, Request
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.target import target

LARGEST_HEAD = 256
ALIGNED = 64  # columns that the copy engine and the tensor cores take together


def hopper(
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
    """Attention by the kernels for Hopper, of a request that they do not refuse."""
    value_dim = v.shape[-1]
    q, k, v, mask, bias, dropout = vary_alike((q, k, v, mask, bias, dropout))
    q, k, v = (pad(a, 3, ALIGNED) for a in (q, k, v))
    plan = KernelPlan(
        query_length=q.shape[1],
        key_length=k.shape[1],
        group=q.shape[2] // k.shape[2],
        scale=float(scale),
        softcap=softcap,
        causal_by_position=mask.causal_by_position,
        window=mask.window,
        offset=mask.offset if isinstance(mask.offset, int) else None,
        dropout=None if dropout is None else dropout.rate,
        blocks=default_blocks(q.shape[-1], v.shape[-1]),
        interpret=target().interpret,
    )
    output, lse = attend(plan, q, k, v, mask, bias, dropout)
    output = output[..., :value_dim]
    return (output, lse) if return_lse else output


def refusal(request: Request) -> str | None:
    """Reason why these kernels cannot serve, or None if they can."""
    device = target()
    if device.platform != "gpu":
        return f"it needs a Hopper GPU and the device is a {device.platform}"
    if not re.search(r"H(20|100|200|800)\b", device.kind):
        return f"it needs a Hopper GPU (H100, H200, H20, H800, GH200), not {device.kind}"
    return unsupported(request, exact=bool(device.interpret))


IMPLEMENTATION = Implementation("hopper", hopper, refusal, returns_lse=True)


def unsupported(request: Request, exact: bool = False) -> str | None:
    """Part of a request that the kernels cannot express, or None; asks no device.

    Args:
        exact: whether float32 is taken, which the interpreter computes and the chip does not.
    """
    q, k, v, bias = request.q, request.k, request.v, request.bias
    taken = (jnp.bfloat16, jnp.float16, *((jnp.float32,) if exact else ()))
    if q.dtype not in taken or not q.dtype == k.dtype == v.dtype:
        return (
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v: it takes bfloat16 or float16, the "
            "same for all"
        )
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        return (
            f"head_dim {q.shape[-1]} with value_dim {v.shape[-1]}, it takes sizes up to "
            f"{LARGEST_HEAD}"
        )
    if request.scale <= 0:
        return f"a scale of {request.scale}, it takes positive ones"
    if isinstance(bias, DistanceBias) and not isinstance(bias, LinearBias | BucketBias):
        return f"a bias of type {type(bias).__name__}, it takes LinearBias, BucketBias and arrays"
    return None
