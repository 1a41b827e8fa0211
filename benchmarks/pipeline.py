"""Pipelines: a step of each schedule on simulated stages, beside the sequential step.

python -m benchmarks.pipeline [stages=2] [microbatches=8] [schedules=(1f1b,zb_h1)] [json=FILE]

A stage is a device with one thread, so take as many stages as the machine has cores. The schedule's
formula gives the time that a step should take, from that of a sequential step on one device, with
the same microbatches, that recomputes each block as a stage does. Both take turns.
"""

import os
from typing import Any

import jax

from benchmarks.harness import keep_to_cores, save, seconds_of, spread, table
from lmjax.config import UserError, config, replace
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.parallel.schedules import Name, schedule


@config
class PipelineBenchmark:
    """A GPT of a small vocabulary, so that nearly all of the time is that of its blocks."""

    stages: int = 2  # of the pipeline, each a device with one thread
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

    # A stage computes each of its blocks once more in backward: so does this model.
    sides = {"sequential": gradient(1, replace(model, remat="full"))}
    for name in settings.schedules:
        sides[name] = gradient(settings.stages, model, pipeline=Pipeline(schedule=name))
    return sides


def formula(name: Name, settings: PipelineBenchmark) -> float:
    """Duration of a schedule in sequential steps.

    Forward passes of all blocks are the unit. Before gradients of inputs the part is computed
    again, and before those of weights, where they are apart, it is with gradients of inputs.
    """
    made = schedule(name, settings.stages, settings.microbatches)
    times = (1, 2, 3 if made.split else 1)
    duration = made.duration(*(time / len(made.holder) for time in times))
    return duration / (4 * settings.microbatches)


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(PipelineBenchmark())
    jax.config.update("jax_num_cpu_devices", settings.stages)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    keep_to_cores(settings.stages)
    sides = steps(settings)
    formulas = {name: formula(name, settings) for name in settings.schedules}
    formulas["sequential"] = 1.0
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(settings.rounds):
        for name, run in sides.items():
            rounds[name] += seconds_of(run, 1)
    rows, found = [], {}
    for name in sides:
        pairs = zip(rounds[name], rounds["sequential"], strict=True)
        ratios = [ours / base for ours, base in pairs]
        ratio, seconds = spread(ratios), spread(rounds[name])
        found[name] = {"seconds": seconds, "ratio": ratio, "formula": formulas[name]}
        share = ratio["median"] / formulas[name]
        rows.append([name, seconds["median"], ratio["median"], formulas[name], share])
    columns = ["step", "seconds", "of sequential", "formula", "measured / formula"]
    print(table(columns, rows))
    save(settings.json, "pipeline", schedules=found)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
