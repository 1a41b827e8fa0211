"""Names of Pallas Mosaic GPU that moved between jax 0.10 and 0.12."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

try:
    InterpretGPUParams = plgpu.InterpretGPUParams
except AttributeError:  # before 0.12
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams


NEWER = hasattr(plgpu, "wait_gmem_to_smem")  # 0.12


def load(reference, layout) -> Any:
    """An array in global or shared memory, laid out over registers."""
    if NEWER:
        return plgpu.load(reference, layout=layout, optimized=False)
    return plgpu.load(reference, (), layout=layout, optimized=False)


def transposed(reference) -> Any:
    """A view of a matrix in shared memory with its axes exchanged."""
    if NEWER:
        return reference.transpose((1, 0))
    return plgpu.transpose_ref(reference, (1, 0))


def compiler_params() -> Any:
    """Layouts of registers as the kernel says them, and fast exponentials."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


__all__ = ["InterpretGPUParams", "compiler_params", "load", "transposed"]
