"""Rates of the cores of TPUs, as far as a schedule's cycles depend on them."""

from __future__ import annotations

import dataclasses

# Units of a core, as the compiler's lists of used issue slots call them. FILL and SPILL are the
# loads and stores of registers that did not suffice, part of VLD and VST.
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLD", "FILL", "VST", "SPILL", "SALU")


@dataclasses.dataclass(frozen=True)
class ChipRates:
    """One kind of TPU.

    Attributes:
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


# Slots and cycles are from the compiler's dumps; sizes and bandwidths are public.
CHIPS = {
    "v4": ChipRates(
        clock=1.05e9,
        cores=2,
        side=128,
        units={"MXU": 4, "XLU": 2},
        matmul={16: 16, 32: 8},
        crosslane={16: 16, 32: 8},
        transcendental=2,
        bandwidth=1.23e12,
        granule=512,
    ),
    "v5e": ChipRates(
        clock=1.5e9,
        cores=1,
        side=128,
        units={"MXU": 4, "XLU": 3},
        matmul={16: 16, 32: 8},
        crosslane={16: 17, 32: 9},
        transcendental=1,
        bandwidth=0.82e12,
        granule=32,
    ),
    "v5p": ChipRates(
        clock=1.75e9,
        cores=2,
        side=128,
        units={"MXU": 4, "XLU": 3},
        matmul={16: 16, 32: 8},
        crosslane={16: 17, 32: 9},
        transcendental=1,
        bandwidth=2.46e12,
        granule=32,
    ),
    "v6e": ChipRates(
        clock=1.75e9,
        cores=1,
        side=256,
        units={"MXU": 2, "XLU": 2},
        matmul={16: 8, 32: 4},
        crosslane={16: 4, 32: 4},
        transcendental=1,
        bandwidth=1.64e12,
        granule=32,
    ),
}
