"""The public function: checks the arrays and chooses who serves them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_product import tpu
from pallas_kernels.grouped_product.blocks import blocks
from pallas_kernels.grouped_product.ragged import ragged
from pallas_kernels.grouped_product.reference import reference
from pallas_kernels.manual_axes import on_each_device

PLAIN = {"reference": reference, "ragged": ragged, "blocks": blocks}  # in XLA
IMPLEMENTATIONS = (*PLAIN, "tpu")


def implementations() -> tuple[str, ...]:
    """Names that `grouped_product` takes as its implementation."""
    return IMPLEMENTATIONS


def grouped_product(
    x: Float[Array, "tokens in"],
    w: Float[Array, "groups in out"],
    sizes: Int[Array, "groups"],
    *,
    implementation: str | None = None,
) -> Float[Array, "tokens out"]:
    """Product of each row with the matrix of its group, as in a mixture of experts.

    Rows are sorted by group: the first sizes[0] are of group 0, and so on; groups may be empty.
    Rows past the sum of sizes are of no group: they give zeros and get no gradient. Accumulated in
    float32, the result in x's dtype. Arrays are whole on each device (on a mesh, replicated) or
    local to one inside a `jax.shard_map` over all axes of the mesh.

    Args:
        implementation: one of `implementations()`; None is "tpu" where it can serve, else "blocks".

    Raises:
        ValueError: shapes that do not fit, arrays divided over a mesh, or an implementation that is
            not known or cannot serve.
    """
    _check(x, w, sizes, implementation)
    if implementation in (None, "tpu"):
        reason = _refusal(x, w)
        if reason is not None and implementation == "tpu":
            raise ValueError(
                f"grouped_product: implementation 'tpu' cannot serve this call: {reason}"
            )
        implementation = "tpu" if reason is None else "blocks"
    kernel = implementation == "tpu"
    function = tpu.grouped if kernel else PLAIN[implementation]
    if jax.sharding.AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return function(x, w, sizes)
    # No sharding is inferred for these operations: each device does all of it.
    spec = PartitionSpec()
    return on_each_device(function, spec, check_vma=not kernel)(x, w, sizes)


def _refusal(x, w) -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and jax.sharding.AxisType.Auto in mesh.axis_types:
        return "a mesh with automatic axes: a kernel cannot be divided by the compiler"
    return tpu.refusal(x, w)


def _check(x, w, sizes, implementation) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"grouped_product: implementation {implementation!r} is not one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1]:
        raise ValueError(
            "grouped_product: x [tokens in], w [groups in out] and sizes [groups] do not fit: "
            f"{x.shape}, {w.shape}, {sizes.shape}"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"grouped_product: x of {x.dtype} and w of {w.dtype}")
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_product: sizes of {sizes.dtype}, they are integers")
    for name, array in {"x": x, "w": w, "sizes": sizes}.items():
        if any(axes is not None for axes in jax.typeof(array).sharding.spec):
            raise ValueError(
                f"grouped_product: {name} is divided over {jax.typeof(array).sharding.spec}: "
                "call it inside a jax.shard_map over all axes of the mesh"
            )
