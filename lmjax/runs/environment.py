"""The environment that bits of a result depend on: versions, cores, mesh and flags."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe_environment() -> dict[str, Any]:
    """Everything that a rerun must share to repeat every bit, as plain JSON values.

    Devices and mesh are those that are in use now: call it inside `jax.set_mesh`.
    """
    device = jax.devices()[0]
    mesh = jax.sharding.get_abstract_mesh()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        # XLA splits reductions over the cores it finds, so their number changes the last bits.
        "cores": _cores(),
        "processor": _processor(),
        "mesh": dict(mesh.shape),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "prng": str(jax.config.jax_default_prng_impl),
    }


def compare_environment(saved: Mapping[str, Any]) -> list[str]:
    """One line for each thing that was different when `saved` was described.

    Where the list is empty a run goes on with the very bits of an uninterrupted one; otherwise
    its numbers agree only up to rounding.
    """
    now = describe_environment()
    return [
        f"{name}: {saved.get(name, 'not recorded')} before, {now.get(name, 'not recorded')} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def _cores() -> int | None:
    """Cores that this process may use, where the system says; else all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor() -> str:
    """The processor's name: kernels are chosen by its vector instructions."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
