"""Starts of kernels whose arrays, outputs and shared memory have names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from pallas_kernels.attention.hopper.compat import compiler_params
from pallas_kernels.attention.hopper.plan import KernelPlan
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.pallas import plgpu

WARPGROUPS = 3  # two that compute, one that copies
TILING = 8, 64  # of matrices in shared memory


def launch(
    name: str,
    body: Callable,
    arrays: dict[str, Any],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    grid: dict[str, int],
    plan: KernelPlan,
) -> dict[str, jax.Array]:
    """Runs `body(references, indices)` on every point of a grid, as a kernel of this name.

    The references are those of `scratch` by name, `arrays` and `outputs`; the indices have the
    names of the grid's axes, of which the first one changes fastest.
    """
    leaves, structure = jax.tree.flatten(arrays)
    names = [*outputs], [*scratch]

    def kernel(*refs):
        given = refs[: len(leaves)]
        results = refs[len(leaves) : len(leaves) + len(outputs)]
        shared = refs[len(leaves) + len(outputs) :]
        named = dict(zip(names[1], shared, strict=True))
        named["arrays"] = jax.tree.unflatten(structure, given)
        named |= {name: named["arrays"].pop(name) for name in ("lists", "inputs")}
        named["outputs"] = dict(zip(names[0], results, strict=True))
        body(named, {name: lax.axis_index(name) for name in grid})

    kernel.__name__ = f"attention_{name}"  # in profiles
    results = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=tuple(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS,
        thread_name="wg",
        compiler_params=compiler_params(),
        **({"interpret": plan.interpret} if plan.interpret else {}),
    )(*leaves)
    return vary_alike(dict(zip(names[0], results, strict=True)), like=leaves)


def matrix(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory of matrices of 16 bits in the order that the tensor cores read."""
    whole = shape[-2] % TILING[0] == 0 and shape[-1] % TILING[1] == 0
    if dtype.itemsize != 2 or not whole:  # in the interpreter alone
        return plgpu.SMEM(shape, dtype)
    transforms = plgpu.TilingTransform(TILING), plgpu.SwizzleTransform(2 * TILING[1])
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def out(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of an output that varies over mesh axes as `like` does."""
    axes = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
