"""Devices that are described and not there: programs compile for them, and cannot run.

`jax.sharding.SingleDeviceSharding(hopper()[0])` or a mesh of such devices, which is set, is what
arguments of type `jax.ShapeDtypeStruct` are compiled for: `jax.jit(f).lower(...).compile()`.
"""

from __future__ import annotations

import jax
from jax.experimental import topologies

# Of an H100 SXM5: what XLA wants to know of a chip, as text of its GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "H100"
"""


def hopper(devices: int = 1) -> list[jax.Device]:
    """H100 GPUs in one host.

    Raises:
        RuntimeError: the packages that compile for NVIDIA GPUs are not installed: jax-cuda12-plugin
            and jax-cuda12-pjrt in jax's version, nvidia-cuda-runtime-cu12, nvidia-cuda-cupti-cu12,
            nvidia-cuda-nvcc-cu12.
    """
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{devices}"
    )
    return list(described.devices)
