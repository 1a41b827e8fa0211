"""Time of a compiled training step from the schedule of its kernels, loop by loop.

A TPU runs the instructions of a compiled program one after another, in the order of its text. Each
takes the cycles of its kernel (`lmjax.scaling.step_kernels`) or the time that its bytes need at the
memory's rate, whichever is longer; a loop takes the time of its body as often as it turns. What
links carry is timed at the rates of `Cluster.rates`, as the planner does. A collective that is one
instruction is waited for. One that is begun and awaited by two runs meanwhile, after others over
the same axis, and only what is left of it where it is awaited is waited for; copies between
memories do likewise. Of a conditional the longest branch counts.

Three times are told: by cycles alone, without any wait, which a chip cannot go below; by the longer
of cycles and bytes, with the waits for links; and with an estimate of what each kernel waits for
its transfers, latencies included.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lmjax.scaling.plan import StepPlan
from lmjax.scaling.program import (
    ARRAY,
    CONTROL,
    CompiledProgram,
    HloInstruction,
    ProgramCollective,
    array_bytes,
    called,
    chain,
)
from lmjax.scaling.replica_groups import axes_of
from lmjax.scaling.step_kernels import KernelCost
from pallas_kernels.chips import CHIPS, TpuChip

PARTS = "products", "attention", "loss", "optimizer", "rest"
WAITS = "collectives", "copies"
Bound = Literal["static", "roofline", "waited"]
Source = Literal["schedule", "estimate", "none"]
# Names that others hold; the others of `CONTROL` are gone through.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
SMALL = 4096  # bytes
NAMES_ONLY = ("ConcatBitcast", "Bitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")
ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
SCOPE = re.compile(r'op_name="([^"]*)"')
TARGET = re.compile(r'custom_call_target="(\w+)"')
OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class ScheduledPiece:
    """An instruction of a program that takes a chip's time.

    Attributes:
      name: of it.
      part: of the step that it belongs to, one of `PARTS`.
      runs: times that it runs in a step.
      static: seconds of a run by cycles alone.
      roofline: by the longer of cycles and bytes.
      waited: with its waits for memory.
      flops: of its products in a run.
      source: of these numbers: "schedule", the compiler's "estimate", or "none" where there are
        neither.
      guesses: conditions in its kernel that were not known.
    """

    name: str
    part: str
    runs: int
    static: float
    roofline: float
    waited: float
    flops: float
    source: Source
    guesses: int = 0


@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """A compiled step with the kernels of its instructions.

    Attributes:
      program: what was compiled.
      plan: for how many chips, with which links.
      kernels: of instructions by name.
    """

    program: CompiledProgram
    plan: StepPlan
    kernels: Mapping[str, KernelCost]

    @property
    def chip(self) -> TpuChip:
        """The kind of chip."""
        return CHIPS[self.plan.cluster.accelerator.name]

    @functools.cached_property
    def pieces(self) -> dict[str, ScheduledPiece]:
        """All instructions that take a chip's time, by name."""
        found = [
            (self._piece(line, times), _bytes(line))
            for line, times in timed_instructions(self.program)
        ]
        # Single numbers are computed by the program itself, without kernels.
        return {p.name: p for p, size in found if p.source != "none" or size >= SMALL}

    def seconds(self, bound: Bound) -> dict[str, float]:
        """Seconds of a step by part, and of waits for links and for copies."""
        spent = self.sequence(self.program.entry, bound)
        return {part: spent.get(part, 0.0) for part in (*PARTS, *WAITS)}

    def step(self, bound: Bound) -> float:
        """Seconds of a step; see `seconds`."""
        return sum(self.seconds(bound).values())

    def mfu(self, bound: Bound) -> float:
        """Model FLOPs over the peak."""
        flops = self.plan.tokens * self.plan.workload.model_flops
        return flops / (self.plan.cluster.peak * self.step(bound))

    @functools.cached_property
    def links(self) -> float:
        """Seconds in which links are busy in a step, one collective after another."""
        return sum(self.link(*one)[1] for one in self.program.begun)

    def collective(self, line: HloInstruction):
        """See `CompiledProgram.collective`."""
        if line.name not in self._collectives:
            self._collectives[line.name] = self.program.collective(line)
        return self._collectives[line.name]

    @functools.cached_property
    def _collectives(self) -> dict[str, Any]:
        return {}

    def link(self, one: ProgramCollective, line: HloInstruction) -> tuple[str, float]:
        """Axes of the mesh that a collective goes over, and the seconds of its links."""
        axes = axes_of(line.rest, self.plan.division.sizes)
        rates = self.plan.cluster.rates(self.plan.division.sizes)
        return "+".join(axes), one.sent / min((rates[axis] for axis in axes), default=1e30)

    def sequence(self, name: str, bound: Bound) -> dict[str, float]:
        """Seconds of one run of a sequence of instructions by part."""
        if (name, bound) not in self._timed:
            run = _Run(self, bound, self.program.computations[name])
            self._timed[name, bound] = run.spent
        return self._timed[name, bound]

    @functools.cached_property
    def _timed(self) -> dict[tuple[str, str], dict[str, float]]:
        return {}

    def _piece(self, line: HloInstruction, runs: int) -> ScheduledPiece:
        flops = self.program.flops_of(line)
        part, chip, cost = self._part(line, flops), self.chip, self.kernels.get(line.name)
        if cost is not None:
            static, waited = cost.cycles / chip.clock, cost.waited
            moved = cost.moved
            if flops and self.collective(line) is not None:
                # How often it looks after the links is not known; its products' bytes are.
                moved = waited = self.program.product_bytes(line)
                waited /= chip.bandwidth
            roofline = max(static, moved / chip.bandwidth)
            times = static, roofline, max(waited, roofline)
            return ScheduledPiece(line.name, part, runs, *times, flops, "schedule", cost.guesses)
        if match := ESTIMATE.search(line.rest):
            times = (int(match[1]) / chip.clock,) * 3
            return ScheduledPiece(line.name, part, runs, *times, flops, "estimate")
        return ScheduledPiece(line.name, part, runs, 0.0, 0.0, 0.0, flops, "none")

    def _part(self, line: HloInstruction, flops: float) -> str:
        """The part of the step that an instruction belongs to, by the scopes of the model."""
        lines = [inner for name, inner in self.program.inside(line)]
        products = [inner for inner in lines if inner.operation in ("dot", "convolution")]
        scope = next((s[1] for one in products or lines if (s := SCOPE.search(one.rest))), "")
        words = set(re.findall(r"\w+", scope))
        kernel = line.name if line.operation == "custom-call" else ""
        if "optimizer" in words:
            return "optimizer"
        if "head" in words or "cross_entropy" in kernel:
            return "loss"
        if "attention_" in kernel or {"attention", "shard_map"} <= words:
            return "attention"
        return "products" if products or flops else "rest"


class _Run:
    """One run through a sequence of instructions: what is spent, and what is under way."""

    def __init__(self, schedule: StepSchedule, bound: Bound, lines: Sequence[HloInstruction]):
        self.schedule, self.bound = schedule, bound
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.free: dict[str, float] = collections.defaultdict(float)  # when links have no work left
        self.done: dict[str, float] = {}  # when what was begun is done
        self.now = 0.0
        self.parts = collections.Counter(map(self._chain, lines))  # that a collective is cut into
        for line in lines:
            self._through(line)

    def _chain(self, line: HloInstruction) -> str | None:
        one = self.schedule.collective(line)
        return None if one is None else chain(one[1])

    def _through(self, line: HloInstruction) -> None:
        kind = line.operation
        if kind in CONTROL:
            return self._control(line)
        if (one := self.schedule.collective(line)) is not None:
            return self._collective(line, *one)
        if kind.endswith("-start"):
            self._begin(line.name, "memory", copied_bytes(line) / self.schedule.chip.bandwidth)
        elif kind.endswith("-done"):
            part = "collectives" if "permute" in kind or "all-" in kind else "copies"
            self._await(OPERAND.search(line.rest)[1], part)
        elif (piece := self.schedule.pieces.get(line.name)) is not None:
            self._spend(piece.part, getattr(piece, self.bound))

    def _control(self, line: HloInstruction) -> None:
        """A loop as often as it turns, the longest branch of a conditional, a call."""
        program = self.schedule.program
        found = [self.schedule.sequence(name, self.bound) for name in called(line)]
        times = program.trips(line) if line.operation == "while" else 1
        if line.operation == "conditional":
            found = [max(found, key=lambda spent: sum(spent.values()))]
        for spent in found:
            for part, seconds in spent.items():
                self._spend(part, times * seconds)

    def _collective(self, line: HloInstruction, one: ProgramCollective, inner) -> None:
        """One that is waited for, or the beginning, the end or what is between of another.

        What is between computes something else as well.
        """
        axes, seconds = self.schedule.link(one, inner)
        key = chain(inner)
        if line.operation.endswith("-start"):
            return self._begin(line.name, axes, seconds)
        if key not in self.done:
            self._begin(key, axes, seconds)
        if (piece := self.schedule.pieces.get(line.name)) is not None:
            self._spend(piece.part, getattr(piece, self.bound))
        self.parts[key] -= 1
        if not self.parts[key]:
            self._await(key, "collectives")

    def _spend(self, part: str, seconds: float) -> None:
        self.spent[part] += seconds
        self.now += seconds

    def _begin(self, name: str, links: str, seconds: float) -> None:
        begin = max(self.now, self.free[links])
        self.done[name] = self.free[links] = begin + seconds

    def _await(self, name: str, part: str) -> None:
        late = max(0.0, self.done.pop(name, 0.0) - self.now)
        if self.bound != "static":
            self._spend(part, late)


def timed_instructions(program: CompiledProgram) -> list[tuple[HloInstruction, int]]:
    """Instructions that take a chip's own time, and how often each runs.

    Left out are names, loops themselves, what is done by copies and by links alone.
    """
    return [
        (line, times)
        for name, times in program.sequences.items()
        for line in program.computations[name]
        if _takes_time(program, line)
    ]


def _takes_time(program: CompiledProgram, line: HloInstruction) -> bool:
    kind = line.operation
    if kind in FREE or kind in CONTROL or kind.endswith(("-start", "-done", "-update")):
        return False
    if kind == "custom-call":
        return (target := TARGET.search(line.rest)) is None or target[1] not in NAMES_ONLY
    return program.collective(line) is None or bool(program.flops_of(line))


def copied_bytes(line: HloInstruction) -> int:
    """Bytes that an asynchronous copy moves: those of the smaller of both ends in its result."""
    sizes = [array_bytes(*found) for found in ARRAY.findall(line.result)]
    return min((size for size in sizes if size > 16), default=0)


def _bytes(line: HloInstruction) -> int:
    return sum(array_bytes(*found) for found in ARRAY.findall(line.result))
