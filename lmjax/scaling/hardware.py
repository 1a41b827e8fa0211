"""Devices of this process: peak rate of matrix products, and memory.

Peaks are the makers' dense bfloat16 rates. A device whose name is not in the table has no peak: a
share of a guessed number would be worse than none.
"""

import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

GB = 10**9
GIB = 2**30


@runtime_checkable
class Device(Protocol):
    """Attributes of a `jax.Device` that are used; devices of a described topology have them too."""

    device_kind: str
    platform: str
    process_index: int

    def memory_stats(self) -> dict[str, int] | None: ...


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator as its maker describes it.

    Attributes:
      flops: dense bfloat16 FLOPs a second.
      memory: bytes of high-bandwidth memory.
      cores: TensorCores of a TPU chip. JAX shows a chip as one device of all cores (megacore) or
        as one device a core, and `device.num_cores` tells which; 1 for everything else.
      shown: cores of one device where JAX does not tell.
    """

    flops: float
    memory: int
    cores: int = 1
    shown: int = 1


TPU_V4 = Chip(275e12, 32 * GIB, cores=2, shown=2)
TPU_V5E = Chip(197e12, 16 * GIB)
TPU_V5P = Chip(459e12, 95 * GIB, cores=2, shown=2)
TPU_V6E = Chip(918e12, 32 * GIB)
# No tensor cores for bfloat16: the rate is float16's.
V100_SXM = 125e12
V100_PCIE = 112e12

# By device.device_kind, a leading "NVIDIA " or "Tesla " left out. TPU: cloud.google.com/tpu/docs;
# GPU: NVIDIA's data sheets, where figures "with sparsity" are halved.
CHIPS = {
    "TPU v2": Chip(46e12, 16 * GIB, cores=2),
    "TPU v3": Chip(123e12, 32 * GIB, cores=2),
    "TPU v4": TPU_V4,
    "TPU v5 lite": TPU_V5E,
    "TPU v5e": TPU_V5E,
    "TPU v5": TPU_V5P,
    "TPU v5p": TPU_V5P,
    "TPU v6 lite": TPU_V6E,
    "TPU v6e": TPU_V6E,
    "TPU7x": Chip(2307e12, 192 * GIB, cores=2),
    "TPU v7x": Chip(2307e12, 192 * GIB, cores=2),
    "V100-SXM2-16GB": Chip(V100_SXM, 16 * GB),
    "V100-SXM2-32GB": Chip(V100_SXM, 32 * GB),
    "V100-PCIE-16GB": Chip(V100_PCIE, 16 * GB),
    "V100-PCIE-32GB": Chip(V100_PCIE, 32 * GB),
    "A100-SXM4-40GB": Chip(312e12, 40 * GB),
    "A100-SXM4-80GB": Chip(312e12, 80 * GB),
    "A100-PCIE-40GB": Chip(312e12, 40 * GB),
    "A100 80GB PCIe": Chip(312e12, 80 * GB),
    "H100 80GB HBM3": Chip(989.4e12, 80 * GB),
    "H100 PCIe": Chip(756e12, 80 * GB),
    "H100 NVL": Chip(835.5e12, 94 * GB),
    "H200": Chip(989.4e12, 141 * GB),
    "H200 NVL": Chip(835.5e12, 141 * GB),
    "B200": Chip(2250e12, 180 * GB),
}


@dataclasses.dataclass(frozen=True)
class Peak:
    """The peak that the speed of a run is compared with.

    Attributes:
      flops: FLOPs a second of all devices together; None where it is not known.
      note: where the number is from, or why there is none.
    """

    flops: float | None
    note: str


def find_peak(devices: Sequence[Device] | None = None) -> Peak:
    """The matrix-product peak of `devices` (default: all of the run), together.

    A TPU or GPU is looked up. On CPU devices, of which there may be several simulated ones, a
    float32 product is measured, once in a process.
    """
    devices = jax.devices() if devices is None else devices
    kinds = sorted({device.device_kind for device in devices})
    if {device.platform for device in devices} == {"cpu"}:
        hosts = len({device.process_index for device in devices})
        rate = _measured_product()
        return Peak(
            hosts * rate, f"measured float32 matrix product, {hosts} x {rate / 1e9:.0f} GFLOP/s"
        )
    if unknown := [kind for kind in kinds if _chip(kind) is None]:
        return Peak(None, f"no peak is known for {', '.join(map(repr, unknown))}: no MFU is given")
    total = sum(_chip(device.device_kind).flops * _share(device) for device in devices)
    rate = total / len(devices) / 1e12
    return Peak(total, f"{len(devices)} x {', '.join(kinds)}, {rate:,.1f} TFLOP/s dense bfloat16")


def memory_size(device: Device) -> int | None:
    """Bytes of memory that arrays of this device can fill; None where that is not known."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and (chip := _chip(device.device_kind)) is not None:
        limit = int(chip.memory * _share(device))
    return limit


def memory_in_use() -> int:
    """Bytes in use on the fullest local device; on CPU the resident memory of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_in_use" in entry for entry in stats):
        return max(entry["bytes_in_use"] for entry in stats)
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return _largest_resident()


def peak_memory_in_use() -> int:
    """The most that `memory_in_use` has been so far."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in entry for entry in stats):
        return max(entry["peak_bytes_in_use"] for entry in stats)
    return _largest_resident()


def _chip(kind: str) -> Chip | None:
    """The table's entry; a slice of a GPU (MIG) has another name and none."""
    return CHIPS.get(kind.removeprefix("NVIDIA ").removeprefix("Tesla "))


def _share(device: Device) -> float:
    """Part of a chip that the device is."""
    chip = _chip(device.device_kind)
    if chip.cores == 1:
        return 1.0
    return getattr(device, "num_cores", chip.shown) / chip.cores


def _largest_resident() -> int:
    """Largest resident memory of this process so far; kilobytes on Linux, bytes on macOS."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


@functools.cache
def _measured_product(size: int = 1024, repetitions: int = 3) -> float:
    """FLOPs a second of a float32 product of square matrices on this host, the best of a few."""
    device = jax.local_devices()[0]
    mesh = jax.make_mesh((1,), ("device",), axis_types=(AxisType.Explicit,), devices=[device])
    with jax.set_mesh(mesh):  # one device, whatever mesh the run has: it uses all cores
        matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
        matrix = jax.device_put(matrix, NamedSharding(mesh, PartitionSpec()))
        product = jax.jit(jnp.matmul)
        product(matrix, matrix).block_until_ready()
        seconds = []
        for _ in range(repetitions):
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
