"""The base of all jobs that train a model."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from lmjax.config import UserError, config
from lmjax.console import RunLog, make_console
from lmjax.evaluation.evaluator import Evaluator
from lmjax.jobs.job import Job
from lmjax.jobs.settings import (
    Checkpoints,
    Distillation,
    ElasticPenalty,
    Log,
    Watchdog,
    at_least,
    may_change,
)
from lmjax.jobs.teacher import distilled, teacher_of
from lmjax.jobs.training_run import TrainingRun
from lmjax.models import TransformerConfig, abstract, quantized_weights
from lmjax.objectives import Example, Objective
from lmjax.objectives.distillation import TEACHER
from lmjax.objectives.elastic_weights import ANCHOR, FISHER, ElasticWeights
from lmjax.objectives.example import batches, count_rows, count_tokens
from lmjax.parallel import Context, Layout, Mesh, axis_size, training_layout
from lmjax.remote import check_path
from lmjax.runs.folder import RunFolder
from lmjax.runs.lock import lock_run_folder
from lmjax.scaling.explain import layer_table, print_layers
from lmjax.scaling.flops import training_flops_per_token
from lmjax.training.feed import Feed
from lmjax.training.gradients import Zero
from lmjax.training.learner import Learner, Metrics
from lmjax.training.loop import Advance
from lmjax.training.loss_scale import LossScale
from lmjax.training.offload import Place
from lmjax.training.optimizers import AdamW, Optimizer
from lmjax.training.pipeline_checks import check_division, check_stages
from lmjax.training.pipelining import Pipeline
from lmjax.training.placement import abstract_example, compact, to_devices
from lmjax.training.rounding import Stored
from lmjax.training.schedules import Cosine, Rate, Schedule
from lmjax.training.state import TrainState
from lmjax.training.trainable import Adapters, AllParameters, Trainable, check_base


class FrozenModel(NamedTuple):
    """A model that is read in training.

    Attributes:
      config: of the model.
      folder: run folder or public model folder that its parameters are read from.
    """

    config: TransformerConfig
    folder: str


@config
class TrainingJob(Job):
    """Train a model on examples, from random parameters or from those of another model.

    A job of one's own says what its examples are: `example_shapes`, `prepare`, and the `objective`
    and `evaluators` that fit them. `run` does the rest: mesh, run folder, checkpoints, resuming,
    the loop, evaluations, results and report.
    """

    output: str  # run folder; the same command continues there
    steps: int  # updates of the parameters
    seed: int = 0  # of parameters, order of the data, and dropout
    model: TransformerConfig  # what is trained
    # run folder or public model folder whose parameters are trained further; None: random ones
    begin_with: str | None = None
    objective: Objective  # what it is trained to do
    # which parameters are trained; none: adapters where the model has some (model.lora), else all
    trainable: Trainable | None = None
    optimizer: Optimizer = AdamW()  # turns gradients into updates
    schedule: Schedule = Cosine()  # the learning rate
    elastic: ElasticPenalty | None = None  # what keeps parameters near those of earlier tasks
    distillation: Distillation | None = None  # a teacher, whose predictions are learnt
    # weights of dense layers that are zero when training begins, as in a pruned model, stay so
    keep_zeros: bool = False
    gradient_clip: float | None = 1.0  # largest norm of the gradient; None: no limit
    # scaling of the loss; none: a dynamic one for model.dtype=float16, else the loss as it is
    loss_scale: LossScale | None = None
    optimizer_memory: Place = "device"  # where the optimizer's state lies between steps
    weights: Stored = "float32"  # how parameters are stored from step to step, and in checkpoints
    mesh: Mesh = Mesh()  # how the devices are arranged
    # how attention sees keys of other devices where mesh.context divides sequences: it gathers
    # them, they go around in a ring, or devices exchange parts of sequences for some heads
    context: Context = "gather"
    # mesh.tensor divides norms, dropout and additions between layers as well, along the sequence
    sequence_parallel: bool = False
    zero: Zero = 3  # ZeRO stage: when parameters sharded over mesh.fsdp are gathered
    # parts that a batch is computed in, to save memory, or for the stages of a pipeline to work on;
    # of a smaller batch, fewer
    accumulation: int = 1
    pipeline: Pipeline = Pipeline()  # what the stages do when, where mesh.stage is more than 1
    # decay of an exponential moving average of the parameters, which is then evaluated; none: none
    ema_decay: float | None = None
    evaluators: tuple[Evaluator, ...] = ()  # measures and samples of the model
    checkpoint: Checkpoints = Checkpoints()  # what is kept to go on from
    log: Log = Log()  # of metrics
    watchdog: Watchdog = Watchdog()  # when processes say who is late

    # ---- what a job of one's own says ----------------------------------------------------------

    @abc.abstractmethod
    def example_shapes(self) -> Example:
        """The largest example of the run, in numpy, such as one of padding."""

    @abc.abstractmethod
    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> Feed:
        """The run's examples, made before the first step.

        Args:
          folder: of the run, for what it keeps of the data.
          log: for facts and warnings.
          saved: `Feed.identity` in the newest checkpoint, and all else that it holds beside its
            arrays; empty where there is none.

        Raises:
          UserError: the data cannot be had, or are not those of the checkpoint.
        """

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """The evaluators, in their order."""
        return self.evaluators

    def rate(self, steps: int) -> Rate:
        """Learning rate by 0-based step of a run of `steps`.

        Raises:
          UserError: the schedule does not fit into the run.
        """
        return self.schedule.build(steps)

    def embedding_gradient_rate(self) -> Rate | None:
        """Factor of the embeddings' gradient by step; see `Learner.embedding_gradient`."""
        return None

    def check_batches(self, done: int) -> None:
        """Raises UserError if an example after `done` steps does not divide among the devices."""

    def check_model(self) -> None:
        """Raises UserError for a model that does not go with the other settings."""
        self.taught(self.objective).check(self.model)

    def resolved(self) -> TrainingJob:
        """The job with the settings that follow from files; a mesh is set.

        Raises:
          UserError: a file that is needed cannot be read.
        """
        return self

    def frozen_models(self) -> Mapping[str, FrozenModel]:
        """Models that the objective reads and that are not trained, by its names for them."""
        return {}

    def advance(
        self,
        learner: Learner,
        feed: Feed,
        examples: Iterator[Any],
        frozen: Mapping[str, dict] | None,
    ) -> Advance:
        """A step of the loop: here an update of the parameters by the next example.

        Args:
          learner: of this job.
          feed: of this job.
          examples: what the feed gives for the steps to come.
          frozen: parameters of the models of `frozen_models`.
        """
        given = () if frozen is None else (frozen,)

        def update(state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
            example = next(examples)
            if self.lengths_vary:
                example = compact(self.objective, example, learner.layout)
            example = to_devices(example, learner.layout, self.model.vocab_size)
            return *learner.compiled_step(state, example, *given), count_tokens(example)

        return update

    @property
    def lengths_vary(self) -> bool:
        """Returns whether examples are made smaller where their texts are short (`compact`)."""
        return False

    def facts(self) -> Iterator[tuple[str, str]]:
        """Labels and words about the run, to be printed at its beginning."""
        yield "training", f"{self.steps:,} steps of {count_rows(self.example_shapes())} rows"

    def may_change(self, setting: str) -> bool:
        """See `Job.may_change`."""
        return may_change(setting)

    # ---- the same for all jobs -----------------------------------------------------------------

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        check_path(self.output, "output", write=True)
        check_path(self.begin_with or "", "begin_with")
        at_least(1, self, "steps", "accumulation")
        at_least(0, self, "seed")
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise UserError(f"gradient_clip={self.gradient_clip}: a norm is above 0, or none")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay}: a decay lies between 0 and 1, or none")
        self.check_model()
        if (rows := self.largest_batch()) % self.accumulation:
            raise UserError(
                f"a batch of {rows} rows is no multiple of accumulation={self.accumulation}"
            )

    def run(self) -> None:
        """Trains, or goes on training, in the run folder, and reports.

        Raises:
          UserError: the settings do not fit each other, the devices, the data or the run folder.
          SystemExit: after Ctrl-C or SIGTERM, with the code that shells expect.
        """
        with jax.set_mesh(self.mesh.build()):
            job = self.resolved()
            learner = job.learner()
            with lock_run_folder(job) as folder:
                TrainingRun(job, learner, folder).run()

    def explain(self) -> None:
        """Prints the model's parameters, FLOPs and bytes layer by layer; makes nothing."""
        print_layers(layer_table(self.model, *self._lengths()), make_console())

    def learner(self) -> Learner:
        """The model, its loss and its optimizer; needs only a mesh that is set, no devices.

        Raises:
          UserError: the model or the batch does not divide the mesh, or the schedule the steps.
        """
        layout, trained = training_layout(self.context, self.sequence_parallel), self.trained()
        trained.check(self.model, layout)
        check_base(trained, self.model, layout)
        if self.ema_decay is not None and quantized_weights(self.model):
            setting = "lora.base" if self.model.quantization is None else "quantization"
            raise UserError(
                f"ema_decay={self.ema_decay}: parameters that model.{setting} keeps in few bits"
                " have no average; set ema_decay=none"
            )
        learner = Learner(
            model=self.model,
            objective=self.penalised(self.taught(self.objective)),
            optimizer=self.optimizer,
            rate=self.rate(self.steps),
            layout=layout,
            clip=self.gradient_clip,
            microbatch=self.microbatch,
            microbatch_tokens=self.microbatch_tokens,
            zero=self.zero,
            pipeline=self.pipeline,
            average_decay=self.ema_decay,
            weights=self.weights,
            optimizer_memory=self.optimizer_memory,
            loss_scale=self.scaling,
            embedding_gradient=self.embedding_gradient_rate(),
            frozen=self._frozen_structures(layout),
            begun=self._begun(),
            trained=trained.part(self.model),
            keep_zeros=self.keep_zeros,
        )
        check_stages(learner)
        learner.abstract()
        shards = axis_size(*layout.axes("batch"))
        if self.microbatch % shards:
            raise UserError(
                f"a batch of {self.largest_batch()} rows does not divide into accumulation="
                f"{self.accumulation} parts on mesh.data x mesh.fsdp x mesh.expert = {shards}"
                " devices"
            )
        check_division(learner, self.batch_sizes(), self.abstract_example())
        return learner

    @property
    def scaling(self) -> LossScale | None:
        """The scaling of the loss; None: there is none."""
        half = self.model.dtype == "float16"
        return LossScale() if half and self.loss_scale is None else self.loss_scale

    def penalised(self, objective: Objective) -> Objective:
        """An objective with the penalty of `elastic`, if there is one.

        Raises:
          UserError: the model has adapters, which do not move the weights that are to be kept.
        """
        if self.elastic is None:
            return objective
        if self.model.lora is not None:
            raise UserError(
                "elastic: it keeps weights near others, and adapters (model.lora) do not move them"
            )
        return ElasticWeights(objective=objective, strength=self.elastic.strength)

    def taught(self, objective: Objective) -> Objective:
        """An objective with the teacher of `distillation`, if there is one."""
        return objective if self.distillation is None else distilled(self.distillation, objective)

    def all_frozen_models(self) -> dict[str, FrozenModel]:
        """Those of `frozen_models`, and the teacher.

        Raises:
          UserError: the teacher does not fit the job.
        """
        found = dict(self.frozen_models())
        if self.distillation is not None:
            found[TEACHER] = FrozenModel(teacher_of(self), self.distillation.teacher)
        return found

    def _frozen_structures(self, layout: Layout) -> dict[str, nnx.GraphDef]:
        """Structure of each model that the loss reads and that is not trained."""
        models = {name: model.config for name, model in self.all_frozen_models().items()}
        if self.elastic is not None:
            models |= dict.fromkeys((ANCHOR, FISHER), self.model)
        return {name: abstract(model, layout)[0] for name, model in models.items()}

    def _begun(self) -> frozenset[str]:
        """Names of the frozen models that are the one that training begins with."""
        own = FrozenModel(self.model, self.begin_with)
        return frozenset(name for name, model in self.all_frozen_models().items() if model == own)

    def trained(self) -> Trainable:
        """The choice of parameters that are trained."""
        if self.trainable is not None:
            return self.trainable
        return AllParameters() if self.model.lora is None else Adapters()

    def abstract_example(self) -> Example:
        """The largest example as shapes with shardings, on the mesh that is set."""
        return abstract_example(self.example_shapes(), training_layout())

    def largest_batch(self) -> int:
        """Rows of the largest example."""
        return count_rows(self.example_shapes())

    def batch_sizes(self) -> Sequence[int]:
        """Numbers of rows that examples have."""
        return (self.largest_batch(),)

    @property
    def microbatch(self) -> int:
        """Most rows that are computed at once."""
        return self.largest_batch() // self.accumulation

    @property
    def microbatch_tokens(self) -> int:
        """Most tokens that are computed at once, padding included."""
        return count_tokens(self.example_shapes()) // self.accumulation

    def flops_per_token(self) -> float:
        """Model FLOPs of one token in training; of an encoder and a decoder, the decoder's token.

        The examples say how long each of the two is (T5's decoder reads less than its encoder).
        """
        return training_flops_per_token(self.model, *self._lengths(), self.trained().share)

    def _lengths(self) -> tuple[int, int | None]:
        """Tokens of a row, and of what an encoder reads for it."""
        batch = batches(self.example_shapes())[0]
        source = None if batch.encoder is None else batch.encoder.tokens.shape[1]
        return batch.tokens.shape[1], source
