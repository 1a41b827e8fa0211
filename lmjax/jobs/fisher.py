"""Fisher information of a trained model, by which later training knows what the model needs.

python -m lmjax.jobs.fisher runs/quickstart runs/quickstart_fisher
python -m experiments.instruct elastic=ElasticPenalty elastic.folder=runs/quickstart_fisher
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog, Stopwatch, make_console
from lmjax.data import Data
from lmjax.interop.fisher_folder import FisherInformation, read_fisher, write_fisher
from lmjax.interop.folder import model_folder, read_params
from lmjax.interop.new_folder import new_folder_anywhere
from lmjax.jobs.job import Job
from lmjax.jobs.run_text import read_text, text_of_run
from lmjax.jobs.settings import at_least
from lmjax.launch import import_modules, run
from lmjax.models import TransformerConfig, abstract
from lmjax.objectives import CausalLM, Example, TextObjective, fisher_sums, sampled_loss
from lmjax.objectives.elastic_weights import predicts_classes, sampled_class_loss
from lmjax.objectives.example import TokenTargets
from lmjax.parallel import Layout, Mesh, axis_size, training_layout
from lmjax.remote import check_path
from lmjax.runs.folder import RunFolder
from lmjax.training.placement import to_devices

# (running sums, parameters, example, key) -> sums with those of the example's rows
Add = Callable[[tuple[dict, jax.Array], dict, Example, jax.Array], tuple[dict, jax.Array]]


@config
class Fisher(Job):
    """The diagonal of a model's Fisher information, by labels that it draws itself.

    It is that of one token, in the mean over rows of the text that the model was trained on
    (Kirkpatrick et al. 2017, arXiv:1612.00796); of a classifier, that of one text, or word.
    """

    source: str | None = None  # run folder or public model folder
    output: str = ""  # folder that is made: it must not exist, or be empty
    rows: int = 512  # rows of training text that gradients are taken of, in whole batches
    data: Data | None = None  # the text; none: what the run was trained on
    objective: TextObjective | None = None  # makes examples of it; none: that of the run
    # folder of such information of the tasks before, which is added: one penalty then holds what
    # all of them need, near the newest model (Huszar 2018, arXiv:1712.03847)
    before: str | None = None
    seed: int = 0  # of the order of the rows, and of the labels
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        at_least(1, self, "rows")
        at_least(0, self, "seed")
        for name in ("source", "before"):
            check_path(getattr(self, name) or "", name)
        check_path(self.output, "output", write=True)

    def run(self) -> None:
        """See `Job.run`; computes and writes."""
        if self.source is None or not self.output:
            raise UserError(
                "Which folders? For instance: "
                "python -m lmjax.jobs.fisher runs/quickstart runs/quickstart_fisher"
            )
        import_modules(self.imports)
        log, watch = RunLog(make_console()), Stopwatch()
        if self.is_finished():
            log.fact("Fisher", f"{self.output} has been made before")
            return
        with (
            jax.set_mesh(self.mesh.build()),
            new_folder_anywhere(self.output, index=True) as folder,
        ):
            model = replace(model_folder(self.source), lora=None)
            layout = training_layout()
            params = read_params(self.source, model, layout)
            fisher = self.diagonal(model, params, layout, log)
            if self.before is not None:
                _, before = read_fisher(self.before, model, layout)
                fisher = jax.tree.map(jnp.add, fisher, before)
            write_fisher(folder, FisherInformation(model=model, **self.settings()), params, fisher)
        log.fact("Fisher", f"{self.output}, of {self.rows:,} rows of text", watch.seconds())

    def settings(self) -> dict[str, Any]:
        """Settings that the folder keeps."""
        return {name: getattr(self, name) for name in ("source", "rows", "seed", "before")}

    def is_finished(self) -> bool:
        """Returns whether the folder holds what these settings make."""
        folder = RunFolder(self.output)
        made = folder.experiment() if folder.config.is_file() else None
        return isinstance(made, FisherInformation) and self.settings() == {
            name: getattr(made, name) for name in self.settings()
        }

    def diagonal(self, model: TransformerConfig, params: dict, layout: Layout, log: RunLog) -> dict:
        """The Fisher information, sharded as the parameters are."""
        known = text_of_run(self.source)
        if known is None and self.data is None:
            raise UserError(f"{self.source} does not say what text it was trained on: give data")
        text = known or (None, CausalLM())
        data, objective = self.data or text[0], self.objective or text[1]
        feed = read_text(data, objective, self.source, model, log, self.seed)
        total = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32)
        add, key, rows, number = adder(model, layout, objective), jax.random.key(self.seed), 0, 0
        with log.phase("Fisher information") as report, feed.examples(0) as examples:
            while rows < self.rows:
                report("Fisher information", rows, self.rows)
                example = next(examples)
                check_targets(example, objective)
                rows += len(example.inputs.tokens) * jax.process_count()
                example = to_devices(example, layout, model.vocab_size)
                total = add(total, params, example, jax.random.fold_in(key, number))
                number += 1
        squares, weight = total
        return jax.tree.map(lambda a: a / jnp.where(weight > 0, weight, 1), squares)


def adder(model: TransformerConfig, layout: Layout, objective: TextObjective) -> Add:
    """The function, compiled, that adds the squared gradients of an example's rows.

    They are taken of one row at a time on each of the devices that share a batch: of as many rows,
    one gradient.
    """
    graph, shards = abstract(model, layout)[0], axis_size(*layout.axes("batch"))

    def split(a: jax.Array) -> jax.Array:  # strided, so that no row changes its device
        return jnp.moveaxis(a.reshape(shards, -1, *a.shape[1:]), 1, 0)

    def loss(params: dict, example: Example, key: jax.Array) -> Any:
        model = nnx.merge(graph, params)
        if predicts_classes(objective):
            return sampled_class_loss(objective, model, example, key)
        return sampled_loss(model, example, key)

    @jax.jit
    def add(total, params, example, key):
        return jax.tree.map(
            jnp.add, total, fisher_sums(loss, params, jax.tree.map(split, example), key)
        )

    return add


def check_targets(example: Example, objective: TextObjective) -> None:
    """Raises UserError for an objective that predicts neither tokens nor classes."""
    if not isinstance(example.targets, TokenTargets) and not predicts_classes(objective):
        raise UserError(
            f"{type(objective).__name__} predicts neither tokens nor classes, of which labels are"
            " drawn; give an objective such as CausalLM"
        )


if __name__ == "__main__":
    run(Fisher(), positional=("source", "output"))
