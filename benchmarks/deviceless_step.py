"""The worker of `benchmarks.deviceless`: compiles one training step for a described slice."""

import dataclasses
import datetime
import os
import resource
import time
from typing import Any

from benchmarks.harness import serve
from lmjax.scaling.clusters import find_cluster
from lmjax.scaling.compiled import CompiledStep, StepDoesNotFit, compile_step
from lmjax.scaling.plan import StepPlan
from lmjax.scaling.plan_command import PlanCommand


@dataclasses.dataclass(frozen=True)
class DevicelessCase:
    """A training step to compile.

    Attributes:
      experiment: module below `experiments`.
      topology: slice of TPUs.
      words: settings of the experiment.
    """

    experiment: str
    topology: str
    words: str


CASES = {
    "gpt3_175b": DevicelessCase("gpt3_175b", "v4:8x8x8", "mesh.fsdp=64 mesh.tensor=8"),
    "palm_540b": DevicelessCase(
        "palm_540b", "v4:8x8x16", "mesh.data=1 mesh.fsdp=128 mesh.tensor=8 accumulation=16"
    ),
    "glm_130b": DevicelessCase("glm_130b", "v4:4x8x8", "mesh.fsdp=32 mesh.tensor=8"),
    "llama_65b": DevicelessCase(
        "llama_65b", "v4:4x4x8", "mesh.fsdp=16 mesh.tensor=8 accumulation=128"
    ),
    "bloom_176b": DevicelessCase("bloom_176b", "v4:8x8x8", "mesh.fsdp=64 mesh.tensor=8"),
    "falcon_40b": DevicelessCase(
        "falcon_40b", "v4:4x4x8", "mesh.data=1 mesh.fsdp=16 mesh.tensor=8 accumulation=72"
    ),
    "mixtral_8x7b": DevicelessCase("mixtral_8x7b", "v4:4x4x8", "mesh.fsdp=16 mesh.expert=8"),
    "grok1_314b": DevicelessCase(
        "mixtral_8x7b",
        "v4:8x8x16",
        "model=grok1:314B model.dtype=bfloat16 model.remat=full mesh.fsdp=64 mesh.tensor=2",
    ),
}


def compiled_case(name: str) -> dict[str, Any]:
    """Compiles one case; numbers of the plan and of the compiler."""
    begin, before = time.perf_counter(), _processor_seconds()
    case = CASES[name]
    cluster = find_cluster(case.topology)
    command = PlanCommand(experiment=f"experiments.{case.experiment}", topology=case.topology)
    job, plan, _ = command.made(case.words.split(), cluster)
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "topology": case.topology,
        "settings": case.words,
        "mesh": str(plan.division),
        "microbatches": plan.division.microbatches,
        "load": round(os.getloadavg()[0], 1),
        "planned_bytes": {part: round(size) for part, size in plan.memory.parts.items()},
        "planned_total": round(plan.memory.total),
        "planned_mfu": round(plan.mfu, 3),
    }
    try:
        step = compile_step(job, plan)
    except StepDoesNotFit as error:
        return found | {"error": str(error)}
    return found | {
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(_processor_seconds() - before, 1),
        "load_at_the_end": round(os.getloadavg()[0], 1),
        "compiler_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "compiled_bytes": {
            "arguments": step.arguments,
            "temporary": step.temporary,
            "peak": step.peak,
        },
        "planned_over_compiled": round(plan.memory.total / step.peak, 3),
        "program_over_planned_flops": _flops(plan, step),
        "collectives": [
            {"kind": kind, "chips": chips, "loops": loops, "number": number, "bytes": round(sent)}
            for (kind, chips, loops), (number, sent) in sorted(step.collectives.items())
        ],
        "planned_collectives": [
            {"axis": one.axis, "kind": one.kind, "of": one.what, "bytes": round(one.bytes)}
            for one in plan.traffic
        ],
    }


def _processor_seconds() -> float:
    """Of the cores, for this process and for the system on its behalf."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _flops(plan: StepPlan, step: CompiledStep) -> float:
    """FLOPs of the program over those of the plan without attention, whose kernels tell none."""
    division = plan.division
    products = plan.workload.hardware_flops(division) - plan.workload.attention_flops(division)
    return round(step.program.flops * plan.cluster.chips / (products * plan.tokens), 3)


if __name__ == "__main__":
    serve({"compiled_case": compiled_case})
