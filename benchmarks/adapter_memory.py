"""Memory of steps that train adapters, beside forward passes and what backward keeps of them.

python -m benchmarks.adapter_memory [layers=6] [batch=8] [remat=full] [json=FILE]

Each side is a process of its own: one evaluates the loss of a batch again and again, the other
trains adapters on it. What counts is the most anonymous memory of the process, less what is no
array of the model: Python, and what compilation has left (given back to the system first, as far as
the C library does). Beside it stands what XLA plans. The activations are the arrays that backward
reads and that are no parameters.
"""

import ctypes
import os
import time
from threading import Event, Thread
from typing import Any

from benchmarks.harness import Worker, save, serve, table
from benchmarks.interop_memory import EVERY, anonymous
from lmjax.config import UserError, config, fields
from lmjax.launch import exit_on_user_error, from_command_line

MODULE = "benchmarks.adapter_memory"
ALLOWED = 1.15  # of forward passes with the activations
WORKER = "LMJAX_ADAPTER_MEMORY_WORKER"  # says to a process that it is one


@config
class AdapterMemory:
    """A LLaMA with adapters of its queries and values."""

    layers: int = 6  # blocks
    hidden: int = 512  # width
    heads: int = 8  # of attention
    vocabulary: int = 8192  # tokens
    length: int = 512  # tokens of a row
    batch: int = 8  # rows of a step
    rank: int = 8  # of the adapters
    remat: str = "none"  # what backward computes again
    steps: int = 5  # that are measured
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for sizes that are none."""
        if min(self.layers, self.length, self.batch, self.rank, self.steps) < 1:
            raise UserError("layers, length, batch, rank and steps are 1 or more")


def main() -> None:
    """Measures, prints, and says whether the bound holds."""
    settings = from_command_line(AdapterMemory())
    os.environ[WORKER] = "1"
    given = {name: getattr(settings, name) for name in fields(AdapterMemory) if name != "json"}
    found = {}
    for side in ("forward", "training"):
        with Worker(MODULE) as worker:
            found[side] = worker.ask(side, **given)
    with Worker(MODULE) as worker:
        activations = worker.ask("activations", **given)
    bound = ALLOWED * (found["forward"]["peak"] + activations)
    kinds = "peak", "planned", "compiled"
    rows = [[s, *(one[k] / 1e6 for k in kinds), one["seconds"]] for s, one in found.items()]
    names = ["", "peak (MB)", "planned by XLA", "left by compilation", "seconds"]
    print(table(names, [*rows, ["activations", activations / 1e6, "-", "-", "-"]]))
    ratios = {
        kind: found["training"][kind] / (found["forward"][kind] + activations)
        for kind in ("peak", "planned")
    }
    holds = "holds" if found["training"]["peak"] <= bound else "DOES NOT HOLD"
    print(f"\ntraining needs {ratios['peak']:.3f} of forward passes with activations: ", end="")
    print(f"{ALLOWED} {holds} (by XLA's plan {ratios['planned']:.3f})")
    found |= {"activations": activations, "ratio": ratios["peak"], "planned": ratios["planned"]}
    save(settings.json, "adapter_memory", settings=given, found=found)


# ---- in the workers ----------------------------------------------------------------------------


def forward(**given: Any) -> dict[str, float]:
    """Peak of evaluations of the loss, without adapters."""
    return _measured(False, given)


def training(**given: Any) -> dict[str, float]:
    """Peak of steps that train adapters."""
    return _measured(True, given)


def activations(**given: Any) -> int:
    """Bytes that backward of a step reads, less parameters."""
    import jax
    from flax import nnx

    with jax.set_mesh(_mesh()):
        learner, example = _learner(given, adapted=True)
        params = learner.init(0).params

        def loss(trained: dict) -> jax.Array:
            model = nnx.merge(learner.graph, learner.trained.whole(trained, params))
            return learner.objective.loss(model, example, None).loss

        _, backward = jax.vjp(loss, learner.trained.of(params))
        own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, example))}
        kept = {
            leaf.unsafe_buffer_pointer(): leaf.nbytes
            for leaf in jax.tree.leaves(backward)
            if isinstance(leaf, jax.Array)
        }
        return sum(size for pointer, size in kept.items() if pointer not in own)


def _measured(trains: bool, given: dict[str, Any]) -> dict[str, float]:
    """Most memory of steps, what XLA plans and compilation left of it, and the seconds."""
    import jax

    start, peak, stop = anonymous(), [0], Event()

    def watch() -> None:
        while not stop.wait(EVERY):
            peak[0] = max(peak[0], anonymous())

    with jax.set_mesh(_mesh()):
        learner, example = _learner(given, adapted=trains)
        function, state = learner.compiled_step, learner.init(0)
        if not trains:
            function, state = learner.compiled_evaluate, state.params
        jax.block_until_ready(state)
        function = function.lower(state, example).compile()
        ctypes.CDLL(None).malloc_trim(0)
        arrays = sum(leaf.nbytes for leaf in jax.tree.leaves((state, example)) if _is_kept(leaf))
        other = anonymous() - arrays
        thread, begin = Thread(target=watch), time.perf_counter()
        thread.start()
        for _ in range(given["steps"]):
            found = function(state, example)
            state = found[0] if trains else state
        jax.block_until_ready(found)
        seconds = time.perf_counter() - begin
        peak[0] = max(peak[0], anonymous())  # also where all steps lie between two looks
        stop.set()
        thread.join()
    plan = function.memory_analysis()
    made = plan.output_size_in_bytes - plan.alias_size_in_bytes
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + made
    compiled = other - start
    return {"peak": peak[0] - other, "planned": planned, "compiled": compiled, "seconds": seconds}


def _is_kept(leaf: Any) -> bool:
    """Returns whether an array's bytes are numbers, and no key."""
    import jax

    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _learner(given: dict[str, Any], adapted: bool) -> tuple[Any, Any]:
    """The learner, and an example of random tokens on the device."""
    import numpy as np

    from lmjax.config import replace
    from lmjax.models import LoRA, llama
    from lmjax.objectives import CausalLM
    from lmjax.parallel import training_layout
    from lmjax.training.learner import Learner
    from lmjax.training.optimizers import AdamW
    from lmjax.training.placement import to_devices
    from lmjax.training.trainable import Adapters, AllParameters

    base, heads, hidden = llama(), given["heads"], given["hidden"]
    attention = {"num_heads": heads, "num_kv_heads": heads, "head_dim": hidden // heads}
    model = replace(
        base,
        vocab_size=given["vocabulary"],
        hidden=hidden,
        num_layers=given["layers"],
        attention=replace(base.attention, **attention),
        feed_forward=replace(base.feed_forward, size=4 * hidden),
        remat=given["remat"],
        lora=LoRA(rank=given["rank"]) if adapted else None,
    )
    trained = Adapters() if adapted else AllParameters()
    layout, objective = training_layout(), CausalLM()
    learner = Learner(
        model, objective, AdamW(), lambda step: 1e-4, layout, trained=trained.part(model)
    )
    shape = given["batch"], given["length"] + 1
    tokens = np.random.default_rng(0).integers(0, given["vocabulary"], shape).astype(np.int32)
    example = objective.prepare(tokens, np.ones_like(tokens), np.zeros(shape[0], np.uint64))
    return learner, to_devices(example, layout, given["vocabulary"])


def _mesh() -> Any:
    """One device."""
    import jax

    from lmjax.parallel import Mesh

    return Mesh(fsdp=1).build(jax.devices()[:1])


if __name__ == "__main__":
    if WORKER in os.environ:
        serve({"forward": forward, "training": training, "activations": activations})
    else:
        with exit_on_user_error():
            main()
