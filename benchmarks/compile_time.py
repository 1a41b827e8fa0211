r"""Time to compile a training step, by depth: layers are scanned, so it should not grow.

python -m benchmarks.compile_time [depths=(6,48)] [model=llama:7B] [json=FILE]
JAX_NUM_CPU_DEVICES=4 python -m benchmarks.compile_time mesh.stage=2 mesh.fsdp=2 accumulation=4
JAX_NUM_CPU_DEVICES=4 python -m benchmarks.compile_time mesh.fsdp=1 mesh.expert=4 \
    model.feed_forward=Experts model.feed_forward.router.capacity=1.25

Nothing is allocated: the step is compiled for shapes. The models take turns, and every time JAX
begins with empty caches.
"""

import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.harness import save, spread, table
from lmjax.config import UserError, config, replace
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import TransformerConfig
from lmjax.models.gpt import gpt2
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW, Optimizer
from lmjax.training.placement import abstract_example
from lmjax.training.schedules import Cosine

PHASES = ("trace", "lower", "compile")


@config
class CompileTimeBenchmark:
    """A whole training step: forward, backward, clipping, optimizer."""

    model: TransformerConfig = gpt2()  # all but its depth
    depths: tuple[int, ...] = (6, 48)  # layers; ratios are to the first
    optimizer: Optimizer = AdamW()  # its update is compiled as well
    length: int = 256  # tokens in a row
    batch: int = 8  # rows
    accumulation: int = 1  # parts of the batch; a pipeline needs as many as stages, or more
    rounds: int = 3  # turns of each depth
    mesh: Mesh = Mesh()  # how the devices are arranged
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        if not self.depths or min(self.depths) < 1:
            raise UserError(f"depths={self.depths}: one number of layers or more, from 1 up")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: it must be at least 1")
        if self.accumulation < 1 or self.batch % self.accumulation:
            raise UserError(f"accumulation={self.accumulation}: it must divide batch={self.batch}")


def phases(settings: CompileTimeBenchmark, layers: int) -> dict[str, float]:
    """Seconds to trace, to lower and to compile the step of a model with that many layers."""
    layout, objective = training_layout(), CausalLM()
    learner = Learner(
        model=replace(settings.model, num_layers=layers),
        objective=objective,
        optimizer=settings.optimizer,
        rate=Cosine(warmup=1).build(100),
        layout=layout,
        microbatch=settings.batch // settings.accumulation,
    )
    state, _ = learner.abstract(), learner.graph  # both are made once, before the step
    rows = np.ones((settings.batch, objective.row_length(settings.length)), np.int32)
    example = objective.prepare(rows, rows, np.zeros(settings.batch, np.uint64))
    example = abstract_example(example, layout)
    step = learner.compiled_step
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = step.trace(state, example)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return dict(zip(PHASES, np.diff(times).tolist(), strict=True))


def measure(settings: CompileTimeBenchmark) -> dict[int, list[dict[str, float]]]:
    """The phases of every round, by depth."""
    jax.config.update("jax_enable_compilation_cache", False)
    found = {layers: [] for layers in settings.depths}
    with jax.set_mesh(settings.mesh.build()):
        phases(settings, 1)  # imports, and what JAX sets up once
        for number in range(settings.rounds):
            for layers in settings.depths[:: -1 if number % 2 else 1]:
                print(f"round {number + 1}: {layers} layers", file=sys.stderr)
                found[layers].append(phases(settings, layers))
    return found


def report(settings: CompileTimeBenchmark, found: dict[int, list[dict]]) -> dict[str, Any]:
    """Prints the table; the totals and their ratios to the first depth."""
    first, rows, results = settings.depths[0], [], {}
    for layers, rounds in found.items():
        total = [sum(turn.values()) for turn in rounds]
        base = [sum(turn.values()) for turn in found[first]]
        ratio = spread([a / b for a, b in zip(total, base, strict=True)])
        medians = [spread([turn[phase] for turn in rounds])["median"] for phase in PHASES]
        rows.append([f"{layers} layers", *medians, min(total), spread(total)["median"]])
        rows[-1] += [ratio["median"], ratio["min"], ratio["max"]]
        results[layers] = {"total_seconds": spread(total), f"over_{first}_layers": ratio}
    columns = ["s (median)", *PHASES, "total (min)", "(median)", f"/ {first} layers", "min", "max"]
    print(table(columns, rows))
    return results


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(CompileTimeBenchmark())
    found = measure(settings)
    save(settings.json, "compile_time", rounds=found, summary=report(settings, found))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
