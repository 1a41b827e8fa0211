"""Kernels of a compiled step as the TPU's compiler scheduled them: cycles, bytes and waits of each.

The listings are those of `pallas_kernels.schedules`, which counts every bundle as often as it runs.
Scalars that attention's kernels read, the lists of tiles that a mask leaves, are made for rows that
are one document of full length, as model FLOPs are counted (`lmjax.scaling.flops`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.scaling.plan import StepPlan
from pallas_kernels.attention import Mask, attention
from pallas_kernels.schedules import ScheduledKernel, equal_kernels, read, traced_calls
from pallas_kernels.schedules.operands import KernelCall
from pallas_kernels.schedules.recording import NOTHING


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One call of a kernel on a chip.

    Attributes:
      cycles: of the core that takes longest, without waits for memory.
      moved: bytes to and from memory, of all cores.
      waited: seconds with the waits for memory, an estimate.
      rows: that go through matrix units.
      guesses: conditions that were not known.
    """

    cycles: int
    moved: int
    waited: float
    rows: int
    guesses: int

    @classmethod
    def of(cls, kernel: ScheduledKernel) -> KernelCost:
        """The numbers of a kernel, without its listing."""
        rows = kernel.use.rows
        moved = kernel.from_memory
        return cls(kernel.cycles, moved, kernel.seconds, rows, kernel.guesses)


def read_kernels(folder: Path, plan: StepPlan, names: Collection[str]) -> dict[str, KernelCost]:
    """The kernels of a folder of dumps by the names of the instructions that they serve.

    Args:
      folder: of the dumps.
      plan: of the step.
      names: of the instructions; those whose kernels are equal have the one that was compiled.

    Raises:
      RuntimeError: there are none.
    """
    chip = plan.cluster.accelerator.name
    words = np.array([plan.workload.model.vocab_size], np.int32)
    calls = [KernelCall("cross_entropy", ("s32[1]",), {0: words})]
    calls += attention_calls(plan)
    equal = equal_kernels(folder)
    own = {equal.get(name, name) for name in names}
    found = {one.name: KernelCost.of(one) for one in read(folder, chip, calls, own)}
    if not found:
        raise RuntimeError(NOTHING)
    return {name: found[one] for name in names if (one := equal.get(name, name)) in found}


def attention_calls(plan: StepPlan) -> list[KernelCall]:
    """The calls of kernels in one layer's attention, forward and backward, on one chip."""
    workload, division = plan.workload, plan.division
    model, tensor = workload.model, division.tensor
    shared = model.attention.kv_heads % tensor
    heads = model.attention.num_heads // tensor
    kv_heads = heads if shared else model.attention.kv_heads // tensor
    rows, length, width = division.rows, workload.length, model.attention.head_dim
    dtype, causal = jnp.dtype(model.dtype), model.attention.causal

    def shape(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, length, heads, width), dtype)

    calls = []
    for window in dict.fromkeys(model.attention.windows):

        def both(q, k, v, d_output, segments, window=window):
            mask = Mask(
                causal=causal, window=window, query_segments=segments, key_segments=segments
            )
            output, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
            return output, pull(d_output)

        q, k = shape(heads), shape(kv_heads)
        segments = np.ones((rows, length), np.int32)
        chip = plan.cluster.accelerator.name
        calls += traced_calls(both, q, k, k, q, segments, chip=chip)
    return calls
