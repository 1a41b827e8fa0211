"""Pallas and its two back ends, imported when a kernel is first traced.

Importing them takes half as long as importing jax, and a CPU uses none of them.
"""

from __future__ import annotations

import importlib
from typing import Any


class _Late:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


pl: Any = _Late("jax.experimental.pallas")
plgpu: Any = _Late("jax.experimental.pallas.mosaic_gpu")
pltpu: Any = _Late("jax.experimental.pallas.tpu")
