"""The nanodo side of `benchmarks.train_step`: a worker that needs a checkout of nanodo.

nanodo (Google DeepMind, Apache 2.0, https://github.com/google-deepmind/nanodo) is no package. Its
model and its optimizer are taken as they are; the loss is that of its `loss` module, written here,
as that module imports libraries for reading data.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import keep_to_cores, seconds_of, serve

OPTIMIZER = {
    "optimizer": "adamw",
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "weight_decay_exclusion_names": ["scale"],
    "clip_by_global_norm": 1.0,
    "decay_type": "constant_without_warmup",
    "init_learning_rate": 1e-3,
    "peak_learning_rate": 1e-3,
    "warmup_steps": 0,
    "num_train_steps": 1,
}
# lmjax's names of a block's parameters by nanodo's; the first of all stands for each block.
BLOCK = {
    "LayerNorm_0.scale": "attention_norm.scale",
    "LayerNorm_1.scale": "feed_forward_norm.scale",
    "CausalAttn_0.query.kernel": "attention.query.weight",
    "CausalAttn_0.key.kernel": "attention.key.weight",
    "CausalAttn_0.value.kernel": "attention.value.weight",
    "CausalAttn_0.attn_out_proj.kernel": "attention.output.weight",
    "Mlp_0.Dense_0.kernel": "feed_forward.up.weight",
    "Mlp_0.Dense_1.kernel": "feed_forward.down.weight",
}


class Side:
    """The model and its step."""

    def prepare(self, folder: str, cores: int, checkout: str, **shape: int) -> dict[str, Any]:
        """Loads what the lmjax side left in `folder`, and compiles."""
        threads = keep_to_cores(cores)
        sys.path.insert(0, checkout)
        import flax
        import jax
        import jax.numpy as jnp
        import optax
        from ml_collections import ConfigDict
        from nanodo import model, optimizer

        names = {"D": "hidden", "H": "heads", "L": "length", "N": "layers", "V": "vocabulary"}
        sizes = {name: shape[ours] for name, ours in names.items()}
        config = model.DoConfig(**sizes, F=4 * shape["hidden"], fsdp_enabled=False)
        module = model.TransformerDo(config)
        with np.load(Path(folder, "start.npz")) as start:
            start = {name: start[name] for name in start.files}
        rows = jnp.asarray(start.pop("rows"))
        params = flax.traverse_util.unflatten_dict(renamed(start, shape["layers"]), sep=".")
        update = optimizer.get_optimizer(ConfigDict(OPTIMIZER))

        def loss_of(params: dict, rows: jax.Array) -> jax.Array:
            logits = module.apply({"params": params}, rows[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
            return jnp.mean(losses)

        def step(params: dict, state: Any, rows: jax.Array) -> tuple[dict, Any, jax.Array]:
            loss, gradients = jax.value_and_grad(loss_of)(params, rows)
            updates, state = update.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        self.state = jax.tree.map(jnp.asarray, params), update.init(params)
        self.rows = rows
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*self.state, rows).compile()
        return {
            "version": f"nanodo with jax {jax.__version__}, flax {flax.__version__}",
            "threads": threads,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        }

    def steps(self, count: int) -> dict[str, list[float]]:
        """Seconds and losses of `count` steps."""
        import jax

        losses = []

        def run():
            *self.state, loss = self.step(*self.state, self.rows)
            jax.block_until_ready(self.state)
            losses.append(float(loss))

        return {"seconds": seconds_of(run, count), "losses": losses}


def renamed(start: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """lmjax's parameters under nanodo's dotted names."""
    found = {
        "embed.embedding": start["embedding.table"],
        "pos_embed.embedding": start["positions.table"],
        "out_ln.scale": start["final_norm.scale"],
    }
    for layer in range(layers):
        for theirs, ours in BLOCK.items():
            found[f"blocks_{layer}.{theirs}"] = start[f"blocks.{ours}"][layer]
    return found


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "steps": side.steps})
