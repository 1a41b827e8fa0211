"""Sizes of TPU chips by the kind that jax calls them, for the choice of blocks."""

from __future__ import annotations

from typing import NamedTuple


class TpuChip(NamedTuple):
    """A TPU as the choice of blocks sees it.

    Attributes:
        cores: on a chip; a kernel's parallel grid axes are divided among them.
        vmem: bytes of vector memory of a core.
        side: rows and columns of its matrix units.
        ridge: floating-point operations of bfloat16 products in the time of a byte from HBM.
    """

    cores: int
    vmem: int
    side: int
    ridge: float


MIB = 2**20
# Public peaks over public HBM rates.
CHIPS = {
    "TPU v4": TpuChip(2, 16 * MIB, 128, 275e12 / 1228e9),
    "TPU v5 lite": TpuChip(1, 128 * MIB, 128, 197e12 / 819e9),
    "TPU v5e": TpuChip(1, 128 * MIB, 128, 197e12 / 819e9),
    "TPU v5": TpuChip(2, 64 * MIB, 128, 459e12 / 2765e9),
    "TPU v5p": TpuChip(2, 64 * MIB, 128, 459e12 / 2765e9),
    "TPU v6 lite": TpuChip(1, 128 * MIB, 256, 918e12 / 1640e9),
    "TPU v6e": TpuChip(1, 128 * MIB, 256, 918e12 / 1640e9),
}
