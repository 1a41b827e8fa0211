"""Pretraining: from text to a trained model, its score beside the baselines, and a report."""

import dataclasses
from typing import Literal

import jax
import optax
from flax import nnx

from lmjax.config import UserError, config
from lmjax.console import make_console
from lmjax.data import Data
from lmjax.jobs.settings import Checkpoints, Evaluation, Log, at_least, may_change
from lmjax.models import TransformerConfig, abstract
from lmjax.models.batch import Batch
from lmjax.models.transformer import NO_HEAD
from lmjax.objectives import CausalLM, Objective
from lmjax.parallel import Layout, Mesh, axis_size, training_layout
from lmjax.remote import check_path
from lmjax.runs.lock import lock_run_folder
from lmjax.scaling.explain import layer_table, print_layers
from lmjax.scaling.flops import count_parameters, training_flops_per_token
from lmjax.training.optimizers import AdamW, Optimizer
from lmjax.training.placement import abstract_batch
from lmjax.training.schedules import Cosine, Rate, Schedule, count_full_batches, through
from lmjax.training.state import TrainState, abstract_state
from lmjax.training.step import TrainStep, Zero, count_parts


@config
class Pretrain:
    """Train a model on text, from random parameters or from those of another model."""

    output: str  # run folder; the same command continues there
    steps: int  # updates of the parameters
    seed: int = 0  # of parameters, order of the data, and dropout
    model: TransformerConfig  # what is trained
    # run folder or public model folder whose parameters are trained further; None: random ones
    begin_with: str | None = None
    objective: Objective = CausalLM()  # what it is trained to do
    data: Data  # the text, the tokenizer, the rows of a step
    optimizer: Optimizer = AdamW()  # turns gradients into updates
    schedule: Schedule = Cosine()  # the learning rate
    # what the schedule counts where data.ramp changes the batch: steps, or batches of the last
    # size, of which a smaller one is a part
    schedule_counts: Literal["steps", "full batches"] = "steps"
    gradient_clip: float | None = 1.0  # largest norm of the gradient; None: no limit
    # (step, factor), ...: what the gradient of token embeddings is multiplied by, with straight
    # lines between; ((0, 0.1),) is 0.1 throughout. A tied head's gradient stays whole. (GLM-130B)
    embedding_gradient: tuple[tuple[int, float], ...] = ()
    mesh: Mesh = Mesh()  # how the devices are arranged
    zero: Zero = 3  # ZeRO stage: when parameters sharded over mesh.fsdp are gathered
    # parts that a batch is computed in, to save memory; while data.ramp keeps it small, fewer
    accumulation: int = 1
    average: float | None = None  # decay of an average of the parameters, which is then evaluated
    evaluation: Evaluation = Evaluation()  # on text that was held out
    checkpoint: Checkpoints = Checkpoints()  # what is kept to go on from
    log: Log = Log()  # of metrics

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        check_path(self.output, "output", write=True)
        check_path(self.begin_with or "", "begin_with")
        at_least(1, self, "steps", "accumulation")
        at_least(0, self, "seed")
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise UserError(f"gradient_clip={self.gradient_clip}: a norm is above 0, or none")
        self._check_embedding_gradient()
        if self.average is not None and not 0 < self.average < 1:
            raise UserError(f"average={self.average}: a decay lies between 0 and 1, or none")
        longest = self.model.max_length
        if longest is not None and self.data.length > longest:
            raise UserError(
                f"data.length={self.data.length} is longer than model.max_length={longest}"
            )
        if not self.model.word_head:
            raise UserError(NO_HEAD)
        self.objective.check(self.model)
        if (rows := max(self.data.sizes)) % self.accumulation:
            raise UserError(
                f"a batch of {rows} rows is no multiple of accumulation={self.accumulation}"
            )

    def _check_embedding_gradient(self) -> None:
        steps = [step for step, _ in self.embedding_gradient]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise UserError(f"the steps of embedding_gradient must rise from 0 on, got {steps}")
        if any(factor < 0 for _, factor in self.embedding_gradient):
            raise UserError(
                f"embedding_gradient={self.embedding_gradient}: a factor is 0 or more, and 1 leaves"
                " the gradient as it is"
            )

    def may_change(self, setting: str) -> bool:
        """Whether a run may go on with another value of a setting, given by its dotted name."""
        return may_change(setting)

    def run(self) -> None:
        """Trains, or goes on training, in the run folder, and reports.

        Raises:
          UserError: the settings do not fit each other, the devices, the data or the run folder.
          SystemExit: after Ctrl-C or SIGTERM, with the code that shells expect.
        """
        from lmjax.jobs.pretraining_run import PretrainingRun

        with jax.set_mesh(self.mesh.build()):
            size, flops = count_parameters(self.model).total, self.flops_per_token()
            parts = self.assemble()
            with lock_run_folder(self) as folder:
                PretrainingRun(self, parts, folder, size, flops).run()

    def explain(self) -> None:
        """Prints the model's parameters, FLOPs and bytes layer by layer; makes nothing."""
        print_layers(layer_table(self.model, *self._lengths()), make_console())

    def flops_per_token(self) -> float:
        """Model FLOPs of one token in training; of an encoder and a decoder, the decoder's token.

        The objective says how long each of the two is (T5's decoder reads less than its encoder).
        """
        return training_flops_per_token(self.model, *self._lengths())

    def _lengths(self) -> tuple[int, int | None]:
        """Tokens of a row, and of what an encoder reads for it."""
        batch = self.objective.shapes(max(self.data.sizes), self.data.length)
        source = None if batch.encoder is None else batch.encoder.tokens.shape[1]
        return batch.tokens.shape[1], source

    def assemble(self) -> "Parts":
        """The step and what it works on, as shapes: needs only a mesh that is set, no devices.

        Raises:
          UserError: the model or the batch does not divide the mesh, or the schedule the steps.
        """
        layout = training_layout()
        schedule = self.rate(self.steps)
        _, shapes = abstract(self.model, layout)
        transform = self.optimizer.build(schedule, shapes)
        averaged = self.average is not None
        graph, state = abstract_state(self.model, layout, transform, self.seed, averaged)
        step = TrainStep(
            graph=graph,
            objective=self.objective,
            transform=transform,
            schedule=schedule,
            clip=self.gradient_clip,
            accumulation=self.accumulation,
            full_rows=max(self.data.sizes),
            zero=self.zero,
            average_decay=self.average,
            embedding_gradient=through(points) if (points := self.embedding_gradient) else None,
        )
        shards = axis_size(*layout.axes("batch"))
        if self.part_rows % shards:
            raise UserError(
                f"a batch of {max(self.data.sizes)} rows does not divide into accumulation="
                f"{self.accumulation} parts on mesh.data x mesh.fsdp = {shards} devices"
            )
        batch = self._abstract_batch(max(self.data.sizes), layout)
        return Parts(layout, graph, transform, state, step, batch)

    def check_batches(self, first_step: int) -> None:
        """Raises UserError if a batch from that step on does not divide among the mesh's devices.

        Batches of a ramp that lie behind do not count: a run whose batch has grown may go on with
        more devices than it could begin with.
        """
        plan = self.data.plan(self.seed)
        coming = [row.batch_size for row in plan.table if row.first_step > first_step]
        for rows in (plan.batch_size(first_step), *coming):
            count_parts(rows, self.part_rows)

    @property
    def part_rows(self) -> int:
        """Most rows that are computed at once."""
        return max(self.data.sizes) // self.accumulation

    def rate(self, steps: int) -> Rate:
        """The learning rate by 0-based step of a run of `steps`.

        Raises:
          UserError: the schedule does not fit into the run.
        """
        if self.schedule_counts == "steps":
            return self.schedule.build(steps)
        plan = self.data.plan(self.seed)
        table = tuple((row.first_step, row.batch_size) for row in plan.table)
        full_batches = -(-plan.row0(steps) // table[-1][1])
        return count_full_batches(self.schedule.build(full_batches), table)

    def _abstract_batch(self, rows: int, layout: Layout) -> Batch:
        return abstract_batch(self.objective.shapes(rows, self.data.length), layout)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What follows from the settings and the mesh before any array is made.

    Attributes:
      layout: where axes lie.
      graph: structure of the model.
      transform: the optimizer.
      state: the training state as shapes with shardings.
      step: (state, batch) -> (state, metrics), not yet compiled.
      batch: the largest batch as shapes with shardings.
    """

    layout: Layout
    graph: nnx.GraphDef
    transform: optax.GradientTransformation
    state: TrainState
    step: TrainStep
    batch: Batch
