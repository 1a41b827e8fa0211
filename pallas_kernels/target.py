"""The device that a program is traced for, which need not be in the machine that traces it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_interpreted: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
    "interpreted", default=None
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A device as kernels see it.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: name of the chip, such as "TPU v5 lite".
        interpret: what Pallas takes as its `interpret`; False compiles for the device.
    """

    platform: str
    kind: str
    interpret: Any = False


def target() -> Target:
    """The device of the mesh that is set, which may only be described; else the default device."""
    if (chosen := _interpreted.get()) is not None:
        return chosen
    described = jax.sharding.get_abstract_mesh().abstract_device
    device = described or jax.devices()[0]
    return Target(device.platform, device.device_kind)


@contextlib.contextmanager
def interpreted(kind: str, interpret: Any = True) -> Iterator[None]:
    """Kernels traced inside are those for another chip, and an interpreter on the CPU runs them.

    Programs that `jax.jit` has compiled before are not traced again.

    Args:
        kind: of the chip; one that begins with "TPU" is a TPU, any other a GPU.
        interpret: what Pallas takes as its `interpret`.
    """
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    token = _interpreted.set(Target(platform, kind, interpret))
    try:
        yield
    finally:
        _interpreted.reset(token)
