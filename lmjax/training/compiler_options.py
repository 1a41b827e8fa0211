"""Options of the TPU compiler for training steps."""

from __future__ import annotations

from pallas_kernels.target import target

# By default a v4 waits for every gather of weights; later TPUs have them run beside products.
OPTIONS = {
    "TPU v4": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    }
}


def step_options() -> dict[str, str] | None:
    """Options of `jax.jit` for a training step on the mesh that is set; None: there are none."""
    return OPTIONS.get(target().kind)
