"""Chips that are only described: programs compile for them on any machine."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies

# What the smallest host of each kind is called. A v4 chip is one device ("megacore"), as on pods.
TPUS = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
}
TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # processes that compile at once
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    # Unset, libtpu complains loudly and goes on.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v4-8",
}

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


class NoCompiler(ImportError):
    """The package that compiles for a described chip is not installed; the message names it."""


def has_tpu_compiler() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


@functools.cache
def tpu(chip: str, shape: tuple[int, ...] | None = None) -> tuple[jax.Device, ...]:
    """The devices of one host of described TPUs, or of a slice; nothing runs on them.

    A program compiles for them by `jax.jit(f).lower(*shapes).compile()`, where every shape is a
    `jax.ShapeDtypeStruct` with a sharding over these devices.

    Args:
        chip: one of `TPUS`.
        shape: chips along each dimension of a slice, of which a host has two by two; None: a host.

    Raises:
        ValueError: there is no description of that chip, or no slice of that shape.
        NoCompiler: libtpu is not installed.
    """
    if chip not in TPUS:
        raise ValueError(f"no description of the chip {chip!r}: there are {', '.join(TPUS)}")
    if not has_tpu_compiler():
        raise NoCompiler("compiling for a TPU needs libtpu: pip install 'lmjax[tpu]'")
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    topology, options = TPUS[chip]
    if shape is not None:
        topology = f"{topology.partition(':')[0]}:{'x'.join(map(str, shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no slice {topology}: {error}") from None
    return tuple(described.devices)


def mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """A mesh of described devices along one axis, "device", which the compiler may use as it likes.

    Set by `jax.set_mesh`, it tells kernels what they are traced for. No array can be made under it:
    a function that is traced takes and makes only what `jax.jit` traces, or numpy's arrays.
    """
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.sharding.Mesh(np.array(devices), ("device",), axis_types=axis_types)


def has_cuda_compiler() -> bool:
    """Returns whether the packages that compile for NVIDIA GPUs are installed."""
    return importlib.util.find_spec("jax_cuda12_plugin") is not None


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
