"""Settings that training jobs have in common."""

import re

from lmjax.config import UserError, config
from lmjax.evaluation.chat_samples import ChatSamples
from lmjax.evaluation.evaluator import Evaluator
from lmjax.evaluation.held_out import HeldOutLoss
from lmjax.evaluation.hidden_words import HiddenWords
from lmjax.evaluation.task_evaluator import Tasks
from lmjax.evaluation.tasks import EvaluationTask
from lmjax.evaluation.text_baselines import TextBaselines
from lmjax.evaluation.text_samples import TextSamples
from lmjax.generation.sampling import Sampling
from lmjax.jobs.best import BestCheckpoint
from lmjax.objectives.distillation import TeacherLoss
from lmjax.remote import check_path
from lmjax.runs.changes import is_below

# How the same work is done, with the same bits.
RESOURCES = ("data.cache", "data.workers", "data.tokenize_workers", "data.on_change")
# How the same numbers are computed, up to rounding.
ROUNDING = (
    "mesh",
    "context",
    "pipeline",
    "zero",
    "accumulation",
    "optimizer_memory",
    "model.remat",
    "model.unroll",
    "model.attention.implementation",
)
# Settings that may change when a run goes on, with all below them; all others make it another run.
FREE = (
    *("output", "steps", "evaluation", "evaluators", "checkpoint", "log", "watchdog"),
    *RESOURCES,
    *ROUNDING,
)

# Where the text and a tokenizer's folder lie: what is in them is compared by `data.prepare`.
PLACES = re.compile(
    r"data\.train\.\d+\.(source|evaluation)\.(path(\.\d+)?|data_dir)|data\.tokenizer(\.\w+)*\.path"
)


def may_change(setting: str) -> bool:
    """Returns whether a run may go on with another value of a setting, given by its dotted name."""
    return is_below(setting, FREE) or bool(PLACES.fullmatch(setting))


@config
class Evaluation:
    """Measures on held-out text during the run, and samples at its end."""

    every: int = 500  # steps between evaluations on the held-out sets; the end always has one
    tokens: int | None = None  # about how many tokens of each set to evaluate on; None: all
    prompts: tuple[str, ...] = ()  # beginnings of text that the trained model goes on from
    sample_length: int = 80  # most tokens that it adds to each
    sampling: Sampling = Sampling(temperature=0.8, top_k=50)
    tasks: tuple[EvaluationTask, ...] = ()  # that the model is scored on at the same steps

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        at_least(1, self, "every", "tokens", "sample_length")

    def evaluators(self) -> tuple[Evaluator, ...]:
        """The evaluators with these settings."""
        return (
            HeldOutLoss(every=self.every, tokens=self.tokens),
            TextBaselines(tokens=self.tokens),
            HiddenWords(),
            TextSamples(prompts=self.prompts, length=self.sample_length, sampling=self.sampling),
            *self.task_evaluators(),
        )

    def task_evaluators(self) -> tuple[Evaluator, ...]:
        """The evaluator of `tasks`, if there are any."""
        return (Tasks(every=self.every, tasks=self.tasks),) if self.tasks else ()

    def refuse_tasks(self, kind: str) -> None:
        """Raises UserError for tasks of a model, named by its kind, that gives no text."""
        if self.tasks:
            names = ", ".join(task.name for task in self.tasks)
            raise UserError(f"evaluation.tasks={names}: {kind} has no probabilities of texts")


@config
class ChatEvaluation(Evaluation):
    """Measures on held-out conversations during the run, and replies at its end."""

    prompts: tuple[str, ...] = ()  # requests of a user that the trained model replies to
    sample_length: int = 80  # most tokens of a reply

    def evaluators(self) -> tuple[Evaluator, ...]:
        """The evaluators with these settings."""
        length, sampling = self.sample_length, self.sampling
        return (
            HeldOutLoss(every=self.every, tokens=self.tokens),
            TextBaselines(tokens=self.tokens),
            ChatSamples(requests=self.prompts, length=length, sampling=sampling),
            *self.task_evaluators(),
        )


@config
class Checkpoints:
    """Checkpoints: when they are saved, and which of them stay."""

    every: int = 500  # steps between checkpoints; the end and an interruption make one too
    keep: int = 3  # newest checkpoints that stay
    keep_every: int | None = None  # those of multiples of this step stay for ever; None: none do
    # the one with the best evaluation stays too, and is the run's model; none: the newest one is
    best: BestCheckpoint | None = None

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        at_least(1, self, "every", "keep", "keep_every")


@config
class ElasticPenalty:
    """Elastic weight consolidation (EWC): a price for leaving what earlier tasks need.

    strength / 2 times the sum over all parameters of Fisher information times squared distance from
    the model that it is of (Kirkpatrick et al. 2017, arXiv:1612.00796). It is added to the mean
    loss of a token, whatever the objective.
    """

    folder: str  # that model with its Fisher information: what python -m lmjax.jobs.fisher writes
    strength: float = 1000.0  # lambda: found by a sweep, about 1e2 to 1e5

    def validate(self) -> None:
        """Raises UserError for a strength that is not above 0."""
        check_path(self.folder, "folder")
        if self.strength <= 0:
            raise UserError(f"strength={self.strength}: must be above 0")


@config
class Distillation(TeacherLoss):
    """Knowledge distillation: the model, a student, learns what a teacher predicts as well.

    The loss is (1 - weight) times that of the objective, plus weight times temperature^2 times the
    divergence of the student's predictions from the teacher's at the same targets (Hinton et al.
    2015, arXiv:1503.02531).
    """

    teacher: str  # run folder or public model folder, of the same tokenizer; it is not trained

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        check_path(self.teacher, "teacher")
        super().validate()


@config
class Log:
    """Logs of metrics, and traces of steps."""

    every: int = 1  # steps after which metrics are fetched from the devices, all steps' at once
    tensorboard: bool = False  # write event files into the run folder too
    wandb: str | None = None  # project of Weights & Biases to send metrics to
    profile: tuple[int, int] | None = None  # first and last step to trace with JAX's profiler

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        at_least(1, self, "every")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise UserError(f"profile={self.profile}: a first step, from 1 on, and a last one")


@config
class Watchdog:
    """Limits on the time that work may take in a run of several processes.

    Of what takes longer it is said which processes have come to it, and which have not.
    """

    factor: float = 10.0  # times the longest duration of the last 20 of its kind
    least: float = 60.0  # seconds before which nothing is late
    first: float = 1800.0  # seconds for what has not been done before, such as compilation
    end_after: float | None = 3600.0  # seconds after which all processes end; none: they wait

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        at_least(1.0, self, "factor", "least", "first", "end_after")


def at_least(lowest: int | float, settings: object, *names: str) -> None:
    """Raises UserError where one of these fields is a number below the lowest that is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < lowest:
            raise UserError(f"{name}={value}: it must be at least {lowest}")
