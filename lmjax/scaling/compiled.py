"""A plan compared with the training step itself, compiled for chips that are not there.

The compiler says whether it compiles, what memory it needs, what it sends and how it has scheduled
its kernels; nothing runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from typing import Any

import jax

from lmjax.config import UserError, replace
from lmjax.parallel import Mesh
from lmjax.scaling.plan import StepPlan
from lmjax.scaling.plan_tables import PlanTable, gigabytes
from lmjax.scaling.program import CompiledProgram
from lmjax.scaling.schedule_tables import schedule_tables
from lmjax.scaling.step_kernels import read_kernels
from lmjax.scaling.step_schedule import StepSchedule, timed_instructions
from lmjax.training.compiler_options import step_options
from pallas_kernels import topologies
from pallas_kernels.schedules import new_recording

HOST = 4  # chips of the smallest described host


class StepDoesNotFit(UserError):
    """The compiler needs more memory than a chip has; the message says how much."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A training step that was compiled.

    Attributes:
      arguments: bytes of state and batch on a chip.
      temporary: bytes that the program needs beside them.
      peak: most bytes that are there at once.
      seconds: that compilation took.
      program: what came of it.
      schedule: of its kernels, where they were recorded.
    """

    arguments: int
    temporary: int
    peak: int
    seconds: float
    program: CompiledProgram
    schedule: StepSchedule | None = None

    @functools.cached_property
    def collectives(self) -> dict[tuple[str, int, int], tuple[int, float]]:
        """Number that run and bytes that a chip sends, by kind, devices together, and loops."""
        found: dict[tuple[str, int, int], tuple[int, float]] = {}
        for one in self.program.collectives:
            key = one.kind, one.devices, one.loops
            number, sent = found.get(key, (0, 0.0))
            found[key] = number + one.times, sent + one.sent
        return found


def described_devices(plan: StepPlan) -> list[jax.Device]:
    """The described chips of a plan's cluster.

    Raises:
      UserError: there is no description of them, or no compiler for them.
    """
    cluster, kind = plan.cluster, plan.cluster.accelerator.name
    if kind not in topologies.TPUS:
        raise UserError(
            f"compile=true: described are the chips {', '.join(topologies.TPUS)}, not {kind}"
        )
    if cluster.slices > 1:
        raise UserError("compile=true: one slice is compiled for, not several")
    shape = None if cluster.chips <= HOST else cluster.shape
    try:
        devices = topologies.tpu(kind, shape)
    except (ValueError, topologies.NoCompiler) as error:
        raise UserError(f"compile=true: {error}") from None
    return list(devices[: cluster.chips])


def compile_step(job: Any, plan: StepPlan, recorded: bool = False) -> CompiledStep:
    """Compiles the training step of a job on a plan's mesh.

    Args:
      job: the training job.
      plan: its plan, for chips that are described.
      recorded: whether to keep the schedules of the kernels, but for a pipeline, whose stages take
        different branches. Nothing in the process may have used libtpu before.

    Raises:
      StepDoesNotFit: the step needs more memory than a chip has.
      UserError: the model does not divide the mesh, or its compiler is missing.
    """
    division = plan.division
    job = replace(job, mesh=Mesh(**division.sizes), accumulation=division.microbatches)
    # A stage does the work of each microbatch and part once, in one of the schedule's ticks.
    work = division.microbatches * division.parts
    taken = work / division.ticks if division.stage > 1 else 1.0
    # Where nothing is computed again, what is left to decide inside of this work is whether to make
    # the loss, which only the last of all stages' parts does.
    inner = 1 / (division.stage * division.parts) if division.split else 1.0
    if job.frozen_models() or job.distillation is not None:
        raise UserError("compile=true: a step that reads further models is not compiled")
    folder = new_recording() if recorded and division.stage == 1 else None
    with jax.set_mesh(job.mesh.build(described_devices(plan))):
        learner = job.learner()
        (leaves, state), (arrays, rows) = map(
            jax.tree.flatten, (learner.abstract(), job.abstract_example())
        )

        def step(leaves, arrays):  # of classes that check what lowering puts into them
            return jax.tree.leaves(learner.step(state.unflatten(leaves), rows.unflatten(arrays)))

        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(leaves, arrays)
        try:
            compiled = lowered.compile(compiler_options=step_options())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise StepDoesNotFit(f"it does not fit: {str(error).splitlines()[0]}") from None
    seconds = time.perf_counter() - begin
    memory, program = compiled.memory_analysis(), CompiledProgram(compiled.as_text(), taken, inner)
    schedule = None
    if folder is not None:
        names = [line.name for line, _ in timed_instructions(program)]
        schedule = StepSchedule(program, plan, read_kernels(folder, plan, names))
    return CompiledStep(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        seconds,
        program,
        schedule,
    )


def compiled_tables(plan: StepPlan, step: CompiledStep) -> list[PlanTable]:
    """The compiler's numbers beside the formulas'."""
    state = plan.memory.parameters + plan.memory.optimizer + plan.memory.average
    memory = (
        _compared("state and batch", state, step.arguments),
        _compared("all", plan.memory.total, step.peak),
    )
    model = plan.tokens * plan.workload.model_flops / plan.cluster.chips
    each = plan.tokens / plan.cluster.chips
    hardware = each * plan.workload.hardware_flops(plan.division)
    products = hardware - each * plan.workload.attention_flops(plan.division)
    flops = step.program.flops
    work = tuple(
        (name, f"{number:.4g}", f"{flops / number:.3f}")
        for name, number in (
            ("model FLOPs", model),
            ("with what is computed again", hardware),
            ("the same without attention", products),
        )
    )
    note = (
        f"The program has {flops:.4g} FLOPs a chip, its loops' bodies as often as they run. Kernels"
        " of attention do not say how many they have, and are not among them."
    )
    columns = ("", "formula", "compiler", "formula over compiler")
    return [
        PlanTable("Memory of a chip, GB", columns, memory),
        collectives_table(plan, step),
        PlanTable("FLOPs of a chip", ("", "formula", "program over it"), work, note),
        *(schedule_tables(step.schedule) if step.schedule else ()),
    ]


def collectives_table(plan: StepPlan, step: CompiledStep) -> PlanTable:
    """Bytes that a chip sends, by kind and number of chips together."""
    expected: dict[tuple[str, int], float] = collections.defaultdict(float)
    for moved in plan.traffic:
        expected[moved.kind, getattr(plan.division, moved.axis)] += moved.bytes
    rows, seen = [], set()
    for (kind, devices, loops), (number, sent) in sorted(step.collectives.items()):
        first = (kind, devices) not in seen
        seen.add((kind, devices))
        formula = expected.get((kind, devices), 0.0) if first else None
        where = "outside of loops" if not loops else f"inside {loops} loops"
        words = "" if formula is None else gigabytes(formula)
        rows.append((kind, str(devices), where, f"{number:,}", gigabytes(sent), words))
    for (kind, devices), size in expected.items():
        if (kind, devices) not in seen:
            rows.append((kind, str(devices), "nowhere", "0", "0", gigabytes(size)))
    columns = ("collective", "chips together", "where", "number", "GB sent", "by formula")
    return PlanTable("Collectives of a step", columns, tuple(rows))


def _compared(name: str, formula: float, found: int) -> tuple[str, str, str, str]:
    return name, gigabytes(formula), gigabytes(found), f"{formula / found:.3f}"
