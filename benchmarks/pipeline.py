"""Pipelines: a step of each schedule on simulated stages, beside the sequential step.

python -m benchmarks.pipeline [stages=2] [microbatches=8] [schedules=(1f1b,zb_h1)] [json=FILE]

A stage is a device with one core, so take as many stages as the machine has cores. The schedule's
formula gives the time that a step should take, from that of a sequential step on one device and
core, with the same microbatches, that recomputes each block as a stage does, or of zero-bubble
schedules recomputes nothing. All take turns.
"""

import contextlib
import os
from typing import Any

import jax

from benchmarks.harness import keep_to_cores, save, seconds_of, spread, table
from lmjax.config import UserError, config, replace
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.parallel.schedules import Name, PipelineSchedule, schedule

# Sequential steps, in which blocks are computed again in backward, and in which they are not.
AGAIN, ONCE = "again", "once"


@config
class PipelineBenchmark:
    """A GPT of a small vocabulary, so that nearly all of the time is that of its blocks."""

    stages: int = 2  # of the pipeline, each a device with one core
    microbatches: int = 8  # of a step
    schedules: tuple[Name, ...] = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")
    layers: int = 8  # blocks
    hidden: int = 256  # width
    vocabulary: int = 256  # tokens
    length: int = 256  # tokens of a row
    rows: int = 2  # of a microbatch
    rounds: int = 5  # turns of each side
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for no turns."""
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: it must be at least 1")


def steps(settings: PipelineBenchmark) -> dict[str, Any]:
    """A compiled gradient of each side."""
    import numpy as np

    from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
    from lmjax.objectives import CausalLM
    from lmjax.parallel import Mesh, training_layout
    from lmjax.training.learner import Learner
    from lmjax.training.optimizers import AdamW
    from lmjax.training.pipelining import Pipeline
    from lmjax.training.placement import to_devices

    head_dim = 64
    model = TransformerConfig(
        vocab_size=settings.vocabulary,
        hidden=settings.hidden,
        num_layers=settings.layers,
        max_length=settings.length,
        attention=AttentionConfig(num_heads=settings.hidden // head_dim, head_dim=head_dim),
        feed_forward=FeedForwardConfig(size=4 * settings.hidden),
    )
    objective, rows = CausalLM(), settings.rows * settings.microbatches
    tokens = np.random.default_rng(0).integers(0, settings.vocabulary, (rows, settings.length + 1))
    example = objective.prepare(
        tokens.astype(np.int32), np.ones_like(tokens, np.int32), np.zeros(rows, np.uint64)
    )

    def gradient(stages: int, model: TransformerConfig, **more: Any) -> Any:
        mesh = Mesh(stage=stages, fsdp=1).build(jax.devices()[:stages])
        with jax.set_mesh(mesh):
            learner = Learner(
                model,
                objective,
                AdamW(),
                lambda step: 1e-3,
                training_layout(),
                microbatch=settings.rows,
                **more,
            )
            state = learner.init(0)
            given = to_devices(example, learner.layout, settings.vocabulary)
            compiled = jax.jit(learner.gradients).lower(state, given, state.key).compile()

        def run() -> None:
            with jax.set_mesh(mesh):
                jax.block_until_ready(compiled(state, given, state.key))

        run()
        return run

    sides = {AGAIN: gradient(1, replace(model, remat="full"))}
    if any(name.startswith("zb") for name in settings.schedules):
        sides[ONCE] = gradient(1, model)
    for name in settings.schedules:
        sides[name] = gradient(settings.stages, model, pipeline=Pipeline(schedule=name))
    return sides


def formula(made: PipelineSchedule) -> float:
    """Duration of a schedule in sequential steps.

    Forward passes of all blocks are the unit. Before gradients of inputs the part is computed
    again, unless gradients of weights are apart: then all that both need is kept.
    """
    times = (1, 1 if made.split else 2, 1)
    duration = made.duration(*(time / len(made.holder) for time in times))
    return duration / (sum(times) * made.microbatches)


def all_threads_on(cores: set[int]) -> None:
    """Moves every thread of this process to these cores."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(PipelineBenchmark())
    jax.config.update("jax_num_cpu_devices", settings.stages)
    keep_to_cores(settings.stages)
    cores = os.sched_getaffinity(0)
    sides = steps(settings)
    sizes = settings.stages, settings.microbatches
    made = {name: schedule(name, *sizes) for name in settings.schedules}
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(settings.rounds):
        for name, run in sides.items():
            # Devices share one pool of threads, of which one device would use all.
            all_threads_on(cores if name in made else {min(cores)})
            rounds[name] += seconds_of(run, 1)
    rows, found = [], {}
    for name in sides:
        base = name if name not in made else ONCE if made[name].split else AGAIN
        pairs = zip(rounds[name], rounds[base], strict=True)
        ratio = spread([ours / theirs for ours, theirs in pairs])
        seconds, wanted = spread(rounds[name]), formula(made[name]) if name in made else 1.0
        found[name] = {"seconds": seconds, "of": base, "ratio": ratio, "formula": wanted}
        share = ratio["median"] / wanted
        rows.append([name, seconds["median"], base, ratio["median"], wanted, share])
    columns = ["step", "seconds", "of", "ratio", "formula", "measured / formula"]
    print(table(columns, rows))
    save(settings.json, "pipeline", schedules=found)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
