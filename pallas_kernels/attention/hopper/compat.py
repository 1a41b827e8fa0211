"""Names of Pallas Mosaic GPU that moved between jax 0.10 and 0.12."""

from __future__ import annotations

from typing import Any

from pallas_kernels.pallas import plgpu


def is_newer() -> bool:
    """Returns whether the names are those of jax 0.12."""
    return hasattr(plgpu, "wait_gmem_to_smem")


def interpreter_params(**settings: Any) -> Any:
    """Settings of the interpreter of GPU kernels."""
    if is_newer():
        return plgpu.InterpretGPUParams(**settings)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**settings)


def load(reference, layout) -> Any:
    """An array in global or shared memory, laid out over registers."""
    if is_newer():
        return plgpu.load(reference, layout=layout, optimized=False)
    return plgpu.load(reference, (), layout=layout, optimized=False)


def transposed(reference) -> Any:
    """A view of a matrix in shared memory with its axes exchanged."""
    if is_newer():
        return reference.transpose((1, 0))
    return plgpu.transpose_ref(reference, (1, 0))


def compiler_params() -> Any:
    """Layouts of registers as the kernel says them, and fast exponentials."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
