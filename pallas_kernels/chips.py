"""TPU chips: sizes for the choice of blocks, and rates for the cycles of a schedule."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """One kind of TPU.

    Attributes:
        kinds: what jax calls it.
        vmem: bytes of vector memory of a core.
        clock: cycles a second, such that `peak` is the public number.
        cores: of a chip, which share its memory.
        side: rows and columns of a matrix unit.
        units: number of matrix units (MXU) and cross-lane units (XLU).
        matmul: cycles that a product keeps its matrix unit, by the bits of its operands, for 16
            rows of 16 bits or 8 rows of 32.
        crosslane: cycles that an operation keeps its cross-lane unit, by the bits of its operands.
        bandwidth: bytes a second of the chip's memory.
        granule: bytes that DMAs count in.
    """

    kinds: tuple[str, ...]
    vmem: int
    clock: float
    cores: int
    side: int
    units: dict[str, int]
    matmul: dict[int, int]
    crosslane: dict[int, int]
    transcendental: int
    bandwidth: float
    granule: int

    @property
    def peak(self) -> float:
        """Floating-point operations a second of the chip's matrix units in bfloat16."""
        a_cycle = self.units["MXU"] * self.side**2 * 2 * 16 / self.matmul[16]
        return self.cores * a_cycle * self.clock

    @property
    def ridge(self) -> float:
        """Floating-point operations of bfloat16 products in the time of a byte of memory."""
        return self.peak / self.bandwidth


MIB = 2**20
# Units and cycles are from the compiler's dumps; sizes and bandwidths are public.
CHIPS = {
    "v4": TpuChip(
        kinds=("TPU v4",),
        vmem=16 * MIB,
        clock=1.05e9,
        cores=2,
        side=128,
        units={"MXU": 4, "XLU": 2},
        matmul={16: 16, 32: 8},
        crosslane={16: 16, 32: 8},
        transcendental=2,
        bandwidth=1228e9,
        granule=512,
    ),
    "v5e": TpuChip(
        kinds=("TPU v5 lite", "TPU v5e"),
        vmem=128 * MIB,
        clock=1.5e9,
        cores=1,
        side=128,
        units={"MXU": 4, "XLU": 3},
        matmul={16: 16, 32: 8},
        crosslane={16: 17, 32: 9},
        transcendental=1,
        bandwidth=819e9,
        granule=32,
    ),
    "v5p": TpuChip(
        kinds=("TPU v5", "TPU v5p"),
        vmem=64 * MIB,
        clock=1.75e9,
        cores=2,
        side=128,
        units={"MXU": 4, "XLU": 3},
        matmul={16: 16, 32: 8},
        crosslane={16: 17, 32: 9},
        transcendental=1,
        bandwidth=2765e9,
        granule=32,
    ),
    "v6e": TpuChip(
        kinds=("TPU v6 lite", "TPU v6e"),
        vmem=128 * MIB,
        clock=1.75e9,
        cores=1,
        side=256,
        units={"MXU": 2, "XLU": 2},
        matmul={16: 8, 32: 4},
        crosslane={16: 4, 32: 4},
        transcendental=1,
        bandwidth=1640e9,
        granule=32,
    ),
}
# By the kind of a device, as jax has it.
KINDS = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
