"""The lmjax side of `benchmarks.alignment`: a worker."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import keep_to_cores, seconds_of, serve

WARM_UP = 2  # steps
RATE = 1e-5
PARTS = 8  # of an update of GRPO, so that not all activations of 256 replies are in memory


class Side:
    """A job whose steps are taken one by one."""

    def prepare(self, folder: str, task: str, cores: int, **shape: int) -> dict[str, Any]:
        """Prepares the job, and compiles."""
        threads = keep_to_cores(cores)  # before XLA counts them
        import jax

        from lmjax.console import RunLog, make_console
        from lmjax.interop.folder import read_params
        from lmjax.launch.memory import keep_memory
        from lmjax.runs.folder import RunFolder

        keep_memory()
        self.opened = ExitStack()
        job = make_job(Path(folder), task, **shape)
        jax.set_mesh(job.mesh.build(jax.devices()[:1]))
        job = job.resolved()
        learner = job.learner()
        run = RunFolder(job.output)
        run.path.mkdir(parents=True)
        feed = job.prepare(run, RunLog(make_console()), {})
        frozen = {
            name: read_params(model.folder, model.config, learner.layout)
            for name, model in job.frozen_models().items()
        }
        params = read_params(job.begin_with, job.model, learner.layout, job.seed)
        self.state, self.number = learner.init(job.seed, params), 0
        examples = self.opened.enter_context(feed.examples(0))
        counted = map(self.count, examples) if task == "sft" else examples
        self.advance = job.advance(learner, feed, counted, frozen or None)
        self.each = {"sft": 0, "dpo": shape["pairs"], "grpo": shape["prompts"] * shape["samples"]}
        self.each, self.units = self.each[task], 0
        self.steps(WARM_UP)
        return {
            "version": f"jax {jax.__version__}",
            "threads": threads,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
        }

    def count(self, example: Any) -> Any:
        """Adds the tokens of an example, padding left out."""
        self.units += int(np.count_nonzero(np.asarray(example.inputs.segments)))
        return example

    def steps(self, count: int) -> dict[str, float]:
        """Seconds of `count` steps, and what was done in them."""
        import jax

        def run():
            self.number += 1
            self.state, metrics, _ = self.advance(self.state, self.number)
            jax.block_until_ready((self.state, metrics))

        self.units = 0
        seconds = sum(seconds_of(run, count))
        return {"seconds": seconds, "units": self.units + self.each * count}


def make_job(folder: Path, task: str, **shape: int) -> Any:
    """The job of a task."""
    from lmjax.alignment import DPO, ClippedPolicy, PreferencePairs
    from lmjax.alignment.reward_functions import Reward
    from lmjax.config import config
    from lmjax.data import Conversations, Data, Domain, chat_template
    from lmjax.data.chat.comparisons import Comparisons
    from lmjax.data.chat.requests import Requests
    from lmjax.jobs.finetune import Finetune
    from lmjax.jobs.policy_optimization import PolicyOptimization
    from lmjax.jobs.preference_optimization import PreferenceOptimization
    from lmjax.parallel import Mesh
    from lmjax.training.optimizers import AdamW
    from lmjax.training.schedules import Constant

    @config
    class DistinctLetters(Reward):
        """Number of distinct letters of a reply."""

        def score(self, replies: Any) -> list[float]:
            """See `Reward.score`."""
            return [float(len(set(reply.text))) for reply in replies]

    def data(source: type, **settings: Any) -> Data:
        path, template = str(folder / f"{task}.jsonl"), chat_template("bare")
        domain = Domain(name="lines", source=source(path=path, template=template))
        return Data(train=(domain,), held_out=0.0, cache=str(folder / "cache"), **settings)

    regular = {
        "output": str(folder / f"lmjax_{task}"),
        "begin_with": str(folder / "model"),
        "steps": 1_000_000,
        "optimizer": AdamW(),
        "schedule": Constant(peak=RATE, warmup=0),
        "mesh": Mesh(fsdp=1),
    }
    if task == "sft":
        settings = {"length": shape["length"], "batch_size": shape["batch"]}
        return Finetune(data=data(Conversations, rows="whole_documents", **settings), **regular)
    if task == "dpo":
        settings = {"length": shape["pair_length"], "batch_size": shape["pairs"]}
        objective = PreferencePairs(preference=DPO(beta=0.1))
        read = data(Comparisons, rows="groups", **settings)
        return PreferenceOptimization(objective=objective, data=read, **regular)
    settings = {"length": 128, "batch_size": shape["prompts"]}
    return PolicyOptimization(
        data=data(Requests, rows="groups", **settings),
        rewards=(DistinctLetters(),),
        objective=ClippedPolicy(kl=0.04),
        samples=shape["samples"],
        reply_length=shape["reply"],
        allow_cut_off=True,
        accumulation=PARTS,
        **regular,
    )


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "steps": side.steps})
