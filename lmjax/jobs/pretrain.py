"""Pretraining: from text to a trained model, its score beside the baselines, and a report."""

from typing import Literal

from lmjax.config import UserError, config
from lmjax.data import Data
from lmjax.evaluation.evaluator import Evaluator
from lmjax.jobs.settings import Evaluation
from lmjax.jobs.text_job import TextJob
from lmjax.objectives import CausalLM, TextObjective
from lmjax.training.schedules import Rate, count_full_batches, piecewise_linear


@config
class Pretrain(TextJob):
    """Train a model on text, from random parameters or from those of another model."""

    objective: TextObjective = CausalLM()  # what it is trained to do
    data: Data  # the text, the tokenizer, the rows of a step
    # what the schedule counts where data.ramp changes the batch: steps, or batches of the last
    # size, of which a smaller one is a part
    schedule_counts: Literal["steps", "full batches"] = "steps"
    # (step, factor), ...: what the gradient of token embeddings is multiplied by, with straight
    # lines between; ((0, 0.1),) is 0.1 throughout. A tied head's gradient stays whole. (GLM-130B)
    embedding_gradient: tuple[tuple[int, float], ...] = ()
    evaluation: Evaluation = Evaluation()  # on text that was held out

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        steps = [step for step, _ in self.embedding_gradient]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise UserError(f"the steps of embedding_gradient must rise from 0 on, got {steps}")
        if any(factor < 0 for _, factor in self.embedding_gradient):
            raise UserError(
                f"embedding_gradient={self.embedding_gradient}: a factor is 0 or more, and 1 leaves"
                " the gradient as it is"
            )
        super().validate()

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Those of `evaluation`, and further ones."""
        return (*self.evaluation.evaluators(), *self.evaluators)

    def rate(self, steps: int) -> Rate:
        """See `TrainingJob.rate`."""
        if self.schedule_counts == "steps":
            return self.schedule.build(steps)
        plan = self.data.plan(self.seed)
        table = tuple((row.first_step, row.batch_size) for row in plan.table)
        full_batches = -(-plan.row0(steps) // table[-1][1])
        return count_full_batches(self.schedule.build(full_batches), table)

    def embedding_gradient_rate(self) -> Rate | None:
        """See `TrainingJob.embedding_gradient_rate`."""
        return piecewise_linear(points) if (points := self.embedding_gradient) else None
