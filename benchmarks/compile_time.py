"""Time to compile a training step, by depth: layers are scanned, so it should not grow.

python -m benchmarks.compile_time [depths=(6,48)] [kinds=(plain,pipeline)] [json=FILE]

Compiled are the steps of a plain model, of the same one as a pipeline of two stages (1f1b, four
microbatches), and of a mixture of eight experts divided over two devices, which are simulated.
Nothing is allocated: the step is compiled for shapes. The depths take turns, and every time JAX
begins with empty caches. Times are those of the processors, all threads together, on which other
programs of the machine have less effect than on a clock.
"""

import sys
import time
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.harness import save, spread, table
from lmjax.config import UserError, config, replace
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import ExpertsConfig, TransformerConfig
from lmjax.models.gpt import gpt2
from lmjax.models.routing import TopKRouter
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW, Optimizer
from lmjax.training.placement import abstract_example
from lmjax.training.schedules import Cosine

PHASES = ("trace", "lower", "compile")
Kind = Literal["plain", "pipeline", "experts"]
DEVICES = 2  # of a pipeline, and of experts
MICROBATCHES = 4  # of a pipeline


@config
class CompileTimeBenchmark:
    """A whole training step: forward, backward, clipping, optimizer."""

    model: TransformerConfig = gpt2()  # all but its depth
    kinds: tuple[Kind, ...] = ("plain", "pipeline", "experts")  # of steps
    depths: tuple[int, ...] = (6, 48)  # layers; ratios are to the first
    optimizer: Optimizer = AdamW()  # its update is compiled as well
    length: int = 256  # tokens in a row
    batch: int = 8  # rows
    rounds: int = 3  # turns of each depth
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        if not self.depths or min(self.depths) < 1:
            raise UserError(f"depths={self.depths}: one number of layers or more, from 1 up")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: it must be at least 1")
        if self.batch < 1 or self.batch % MICROBATCHES:
            raise UserError(f"batch={self.batch}: a multiple of {MICROBATCHES}, for the pipeline")
        if "pipeline" in self.kinds and (odd := [n for n in self.depths if n % DEVICES]):
            raise UserError(f"depths={odd[0]}: a pipeline has {DEVICES} stages of as many layers")


def mesh_of(kind: Kind) -> Mesh:
    """The mesh of a kind of step."""
    return {
        "plain": Mesh(fsdp=1),
        "pipeline": Mesh(stage=DEVICES, fsdp=1),
        "experts": Mesh(fsdp=1, expert=DEVICES),
    }[kind]


def model_of(settings: CompileTimeBenchmark, kind: Kind, layers: int) -> TransformerConfig:
    """The model of a kind of step."""
    model = replace(settings.model, num_layers=layers)
    if kind != "experts":
        return model
    experts = ExpertsConfig(size=model.feed_forward.size, router=TopKRouter(capacity=1.25))
    return replace(model, feed_forward=experts)


def phases(settings: CompileTimeBenchmark, kind: Kind, layers: int) -> dict[str, float]:
    """Processor seconds to trace, to lower and to compile the step of a model of so many layers."""
    layout, objective = training_layout(), CausalLM()
    learner = Learner(
        model=model_of(settings, kind, layers),
        objective=objective,
        optimizer=settings.optimizer,
        rate=Cosine(warmup=1).build(100),
        layout=layout,
        microbatch=settings.batch // (MICROBATCHES if kind == "pipeline" else 1),
    )
    state, _ = learner.abstract(), learner.graph  # both are made once, before the step
    rows = np.ones((settings.batch, objective.row_length(settings.length)), np.int32)
    example = objective.prepare(rows, rows, np.zeros(settings.batch, np.uint64))
    example = abstract_example(example, layout)
    step = learner.compiled_step
    jax.clear_caches()
    times = [time.process_time()]
    traced = step.trace(state, example)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    lowered.compile()
    times.append(time.process_time())
    return dict(zip(PHASES, np.diff(times).tolist(), strict=True))


def measure(settings: CompileTimeBenchmark, kind: Kind) -> dict[int, list[dict[str, float]]]:
    """The phases of every round of a kind of step, by depth."""
    jax.config.update("jax_enable_compilation_cache", False)
    found = {layers: [] for layers in settings.depths}
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh.build(jax.devices()[: max(mesh.stage, mesh.expert)])):
        phases(settings, kind, DEVICES)  # imports, and what JAX sets up once
        for number in range(settings.rounds):
            for layers in settings.depths[:: -1 if number % 2 else 1]:
                print(f"{kind}, round {number + 1}: {layers} layers", file=sys.stderr)
                found[layers].append(phases(settings, kind, layers))
    return found


def report(settings: CompileTimeBenchmark, found: dict[Kind, dict]) -> dict[Kind, dict[int, Any]]:
    """Prints the table; of each kind the totals and their ratios to the first depth."""
    first, rows, results = settings.depths[0], [], {}
    for kind, by_depth in found.items():
        results[kind] = {}
        for layers, rounds in by_depth.items():
            total = [sum(turn.values()) for turn in rounds]
            base = [sum(turn.values()) for turn in by_depth[first]]
            ratio = spread([a / b for a, b in zip(total, base, strict=True)])
            medians = [spread([turn[phase] for turn in rounds])["median"] for phase in PHASES]
            name = f"{kind}, {layers} layers"
            rows.append([name, *medians, min(total), spread(total)["median"]])
            rows[-1] += [ratio["median"], ratio["min"], ratio["max"]]
            results[kind][layers] = {"total_seconds": spread(total), f"over_{first}_layers": ratio}
    columns = ["s (median)", *PHASES, "total (min)", "(median)", f"/ {first} layers", "min", "max"]
    print(table(columns, rows))
    return results


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(CompileTimeBenchmark())
    jax.config.update("jax_num_cpu_devices", DEVICES)
    found = {kind: measure(settings, kind) for kind in settings.kinds}
    save(settings.json, "compile_time", rounds=found, summary=report(settings, found))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
