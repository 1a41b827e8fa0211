"""The lmjax side of `benchmarks.train_step`: a worker."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import keep_to_cores, seconds_of, serve

WARM_UP = 2  # steps
LEARNING_RATE = 1e-3


class Side:
    """The model, its step, and its parts."""

    def prepare(
        self, folder: str, cores: int, unroll: int, biases: bool, **shape: int
    ) -> dict[str, Any]:
        """Compiles; leaves the initial parameters and the rows in `folder` for the other sides."""
        threads = keep_to_cores(cores)  # before XLA counts them
        import jax

        from lmjax.objectives import CausalLM
        from lmjax.parallel import Mesh, training_layout
        from lmjax.scaling.flops import training_flops_per_token
        from lmjax.scaling.hardware import find_peak
        from lmjax.training.learner import Learner
        from lmjax.training.optimizers import AdamW
        from lmjax.training.placement import to_devices
        from lmjax.training.schedules import Constant

        jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1]))
        layout, objective = training_layout(), CausalLM()
        self.learner = Learner(
            model=model(unroll, biases, **shape),
            objective=objective,
            optimizer=AdamW(),
            rate=Constant(peak=LEARNING_RATE, warmup=0).build(1),
            layout=layout,
        )
        self.state = self.learner.init(seed=0)
        rows = np.random.default_rng(0).integers(
            0, shape["vocabulary"], (shape["batch"], shape["length"] + 1), np.int32
        )
        seeds = np.zeros(len(rows), np.uint64)
        example = objective.prepare(rows, np.ones_like(rows), seeds)
        self.example = to_devices(example, layout, shape["vocabulary"])
        np.savez(Path(folder, "start.npz"), rows=rows, **by_name(self.state.params))
        self.step = self.learner.compiled_step.lower(self.state, self.example).compile()
        self.parts = {}
        return {
            "version": f"jax {jax.__version__}",
            "threads": threads,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "flops_per_token": training_flops_per_token(self.learner.model, shape["length"]),
            "peak_flops": find_peak().flops,
        }

    def steps(self, count: int) -> dict[str, list[float]]:
        """Seconds and losses of `count` steps."""
        import jax

        losses = []

        def run():
            self.state, metrics = self.step(self.state, self.example)
            jax.block_until_ready(self.state)
            losses.append(float(metrics["loss"]))

        return {"seconds": seconds_of(run, count), "losses": losses}

    def part(self, name: str, count: int) -> dict[str, Any]:
        """Seconds of one kind of operation, forward and backward, and how many a step has."""
        import jax

        if not self.parts:
            from benchmarks.train_step_parts import lmjax_parts

            self.parts = lmjax_parts(self.learner, self.state, self.example)
        run, times = self.parts[name]
        jax.block_until_ready(run())
        return {"seconds": seconds_of(lambda: jax.block_until_ready(run()), count), "times": times}


def model(unroll: int, biases: bool, *, layers, hidden, heads, length, vocabulary, batch) -> Any:
    """A GPT-2 of that shape; without biases it is nanodo's model."""
    from lmjax.config import replace
    from lmjax.models import AttentionConfig, FeedForwardConfig, LayerNormConfig
    from lmjax.models.gpt import gpt2

    return replace(
        gpt2(),
        vocab_size=vocabulary,
        hidden=hidden,
        num_layers=layers,
        max_length=length,
        attention=AttentionConfig(
            num_heads=heads, head_dim=hidden // heads, bias=biases, output_bias=biases
        ),
        feed_forward=FeedForwardConfig(size=4 * hidden, bias=biases),
        norm=LayerNormConfig() if biases else LayerNormConfig(epsilon=1e-6, bias=False),
        unroll=unroll,
    )


def by_name(params: dict) -> dict[str, np.ndarray]:
    """Arrays by their dotted names."""
    import jax

    leaves, _ = jax.tree.flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "steps": side.steps, "part": side.part})
