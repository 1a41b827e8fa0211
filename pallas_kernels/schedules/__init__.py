"""Schedules of compiled TPU kernels, read without a TPU.

libtpu compiles for chips that are not there and writes every kernel's bundles after the allocation
of registers; one bundle starts a cycle. `record` compiles a function, runs the scalar instructions
of its kernels, and so counts every bundle as often as it would run. What it does not see: time that
the core waits for memory (an estimate is kept apart), conflicts between banks of memory, and what
branches cost. Kernels whose steps are shorter than a transfer takes (about a microsecond) are
slower than it says.
"""

from pallas_kernels.chips import CHIPS, TpuChip
from pallas_kernels.schedules.bundles import equal_kernels
from pallas_kernels.schedules.recording import (
    RecordedProgram,
    ScheduledKernel,
    new_recording,
    read,
    record,
    start_recording,
    traced_calls,
)

__all__ = [
    "CHIPS",
    "RecordedProgram",
    "ScheduledKernel",
    "TpuChip",
    "equal_kernels",
    "new_recording",
    "read",
    "record",
    "start_recording",
    "traced_calls",
]
