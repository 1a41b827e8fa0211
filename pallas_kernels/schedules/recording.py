"""Compiling for a TPU that is only described, and keeping the schedules of its kernels."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from pallas_kernels import topologies
from pallas_kernels.chips import CHIPS, TpuChip
from pallas_kernels.schedules.bundles import Listing, Use, read_listings, use_of
from pallas_kernels.schedules.operands import KernelCall, kernel_calls
from pallas_kernels.schedules.scalar_unit import Counts, run

# All else that the compiler could write is tens of megabytes a kernel.
FILES = "packed-bundles-post-ra|static-per-bundle|post-delay-converter|deduplication-map"
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true "
    f"--xla_jf_dump_llo_pass_label_regex={FILES}"
)
NOTHING = "no schedule was written: libtpu was in use before start_recording()"


@dataclasses.dataclass(frozen=True)
class ScheduledKernel:
    """A kernel of a compiled program, and how it runs.

    Attributes:
        listing: its bundles.
        chip: what it is compiled for.
        counts: its run on each of the chip's cores.
        is_pallas: whether it is a Pallas kernel, not one of the compiler's own.
    """

    listing: Listing
    chip: TpuChip
    counts: tuple[Counts, ...]
    is_pallas: bool

    @property
    def name(self) -> str:
        """Of the instruction of the program."""
        return self.listing.name

    @property
    def cycles(self) -> int:
        """Cycles of a call, of the core that takes longest; waits for memory are left out."""
        return max(counts.cycles for counts in self.counts)

    @property
    def seconds(self) -> float:
        """Seconds of a call with the waits for memory, an estimate."""
        return max(counts.cycles + counts.waits for counts in self.counts) / self.chip.clock

    @property
    def moved(self) -> int:
        """Bytes that a call moves between its operands and vector memory, all cores together."""
        return sum(counts.read + counts.written for counts in self.counts)

    @property
    def from_memory(self) -> int:
        """Those of them that the chip's memory gives and takes, all cores together."""
        return self.moved - sum(counts.near for counts in self.counts)

    @property
    def guesses(self) -> int:
        """Conditions that were not known, so that cycles may be wrong; see `Counts`."""
        return sum(counts.guesses for counts in self.counts)

    @functools.cached_property
    def use(self) -> Use:
        """Everything that a call does, all cores together."""
        total = Use()
        for (first, end), use in self.uses.items():
            total.add(use, sum(counts.runs[first, end] for counts in self.counts))
        return total

    @functools.cached_property
    def uses(self) -> dict[tuple[int, int], Use]:
        """Everything that one run of each block of bundles does."""
        blocks = self.counts[0].runs
        return {block: use_of(self.listing, *block, self.chip) for block in blocks}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the cycles of a call in which each unit is taken."""
        return self.use.shares(self.chip, self.listing.capacity)

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix units in a call, padding included."""
        return self.use.rows * self.chip.side**2 * 2


@dataclasses.dataclass(frozen=True)
class RecordedProgram:
    """A compiled program.

    Attributes:
        kernels: in the order of their compilation; equal ones of the compiler's own are there once.
        compiled: what jax returned.
    """

    kernels: tuple[ScheduledKernel, ...]
    compiled: Any

    @property
    def pallas(self) -> tuple[ScheduledKernel, ...]:
        """The Pallas kernels."""
        return tuple(kernel for kernel in self.kernels if kernel.is_pallas)


@functools.cache
def start_recording() -> Path:
    """Has the compiler write its schedules; the folder into which it does.

    It must be called before anything in the process compiles for a TPU or looks for one.
    """
    folder = Path(tempfile.mkdtemp(prefix="schedules-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {FLAGS.format(folder=folder)}".strip()
    # A program that is found there is not compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    return folder


def record(function: Callable, *arguments: Any, chip: str) -> RecordedProgram:
    """Compiles a function for one described chip and counts what its kernels do in a call.

    Args:
        arguments: arrays, or `jax.ShapeDtypeStruct` where values do not matter; pytrees of them.
            Values count where a kernel's scalars are computed from them, as a mask's segments.
        chip: one of `CHIPS`.

    Raises:
        RuntimeError: the compiler wrote nothing: something in the process had used libtpu before
            `start_recording`.
    """
    folder = new_recording()
    traced = _traced(function, arguments, chip)
    with _described(chip):
        compiled = traced.lower().compile()
    calls = kernel_calls(traced.jaxpr, jax.tree.leaves(arguments))
    kernels = []
    for listing in read_listings(folder):
        call = next((call for call in calls if _serves(listing, call)), None)
        if call is not None:
            calls.remove(call)
        kernels.append(_counted(listing, call, CHIPS[chip]))
    if not kernels:
        raise RuntimeError(NOTHING)
    return RecordedProgram(tuple(kernels), compiled)


def new_recording() -> Path:
    """The folder of `start_recording`, emptied for what is compiled next.

    Programs that are in memory are forgotten, as those are not compiled.
    """
    folder = start_recording()
    jax.clear_caches()
    for path in folder.iterdir():
        path.unlink()
    return folder


def traced_calls(function: Callable, *arguments: Any, chip: str) -> list[KernelCall]:
    """The calls of Pallas kernels in a function, with their scalars; nothing is compiled.

    Args:
        arguments, chip: as of `record`.
    """
    traced = _traced(function, arguments, chip)
    return kernel_calls(traced.jaxpr, jax.tree.leaves(arguments))


def read(
    folder: Path,
    chip: str,
    calls: Sequence[KernelCall] = (),
    names: Container[str] | None = None,
) -> Iterator[ScheduledKernel]:
    """The kernels of a folder of dumps, one after another.

    Args:
        calls: whose scalars kernels with these names and operands read; those of others are
            unknown.
        names: of those that are read; None: all.
    """
    for listing in read_listings(folder, names):
        call = next((call for call in calls if _serves(listing, call)), None)
        yield _counted(listing, call, CHIPS[chip])


def _described(chip: str):
    return jax.set_mesh(topologies.mesh([topologies.tpu(chip)[0]]))


def _traced(function: Callable, arguments: Sequence[Any], chip: str):
    """A function as it is traced for one described chip."""
    sharding = SingleDeviceSharding(topologies.tpu(chip)[0])

    def shaped(argument):
        return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=sharding)

    with _described(chip):
        return jax.jit(function).trace(*jax.tree.map(shaped, arguments))


def _counted(listing: Listing, call: KernelCall | None, chip: TpuChip) -> ScheduledKernel:
    """The kernel of a listing, run with the scalars of the call that it serves."""
    scalars = {} if call is None else call.scalars
    counts = tuple(run(listing, chip, scalars, core, chip.cores) for core in range(chip.cores))
    return ScheduledKernel(listing, chip, counts, call is not None)


def _serves(listing: Listing, call: KernelCall) -> bool:
    """Returns whether a listing is of the kernel of a call, by name and operands."""
    if call.name not in listing.name:  # transformations are put around it
        return False
    return all(
        listing.operands.get(index, shape) == shape
        for index, shape in enumerate(call.shapes)
        if not shape.startswith("pred")  # the compiler widens them
    )
