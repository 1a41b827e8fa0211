"""Schedules of TPU kernels: cycles, busy units and spilled registers of what the compiler wrote.

python -m benchmarks.tpu_schedule folder=DUMPS chip=v5e [blocks=true]

The folder is what libtpu fills with LIBTPU_INIT_ARGS="--xla_jf_dump_to=DUMPS
--xla_jf_dump_llo_text=true". Scalars that kernels read of their operands are unknown there, so
branches on them count as not taken; `pallas_kernels.schedules.record`, which compiles a function
itself, knows them, and `benchmarks.kernel_cost` prints them for attention.
"""

from pathlib import Path
from typing import Literal

from benchmarks.harness import table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line
from pallas_kernels.schedules import ScheduledKernel, read

SHOWN = 5  # instructions of a block that are named


@config
class TPUSchedule:
    """A folder of dumps, and what to print of it."""

    folder: str = "schedules"  # with the compiler's dumps
    chip: Literal["v4", "v5e", "v5p", "v6e"] = "v5e"  # for which was compiled
    blocks: bool = False  # a line for each block of bundles that run together
    least: int = 50  # cycles; kernels of fewer are left out


def main() -> None:
    """Reads and prints."""
    settings = from_command_line(TPUSchedule())
    if not Path(settings.folder).is_dir():
        raise UserError(f"folder={settings.folder!r} is no folder")
    kernels = [
        kernel
        for kernel in read(Path(settings.folder), settings.chip)
        if kernel.cycles >= settings.least
    ]
    print(overview(kernels))
    for kernel in kernels if settings.blocks else ():
        print(f"\n{kernel.name}\n{blocks(kernel)}")


def overview(kernels: list[ScheduledKernel]) -> str:
    """A line for each kernel."""
    columns = ["kernel", "cycles", "us", "TFLOP/s", "busiest", "spills", "VMEM MB", "moved MB", "?"]
    rows = []
    for kernel in kernels:
        seconds = kernel.cycles / kernel.chip.clock
        rows.append(
            [
                kernel.name,
                kernel.cycles,
                1e6 * seconds,
                kernel.flops / seconds / 1e12,
                busiest(kernel.shares),
                kernel.use.slots["SPILL"],
                kernel.listing.vmem / 2**20,
                kernel.moved / 1e6,
                kernel.guesses,
            ]
        )
    return table(columns, rows)


def blocks(kernel: ScheduledKernel, least: float = 0.005) -> str:
    """A line for each block of bundles that takes some share of the kernel's cycles."""
    columns = ["bundles", "runs", "length", "empty", "share", "busiest", "spill", "instructions"]
    rows = []
    for (first, end), use in kernel.uses.items():
        runs = [counts.runs[first, end] for counts in kernel.counts]
        share = sum(runs) * (end - first) / max(kernel.use.bundles, 1)
        if share >= least:
            names = " ".join(f"{name} {n}" for name, n in use.names.most_common(SHOWN))
            row = [f"{first:#x}", "+".join(map(str, runs)), end - first, use.empty, share]
            units = busiest(use.shares(kernel.chip, kernel.listing.capacity))
            rows.append([*row, units, use.slots["SPILL"], names])
    return table(columns, rows)


def busiest(shares: dict[str, float], number: int = 3) -> str:
    """The units that are taken in most cycles."""
    order = sorted(shares, key=shares.get, reverse=True)
    return " ".join(f"{unit} {100 * shares[unit]:.0f}%" for unit in order[:number])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
