"""Pretraining: from text to a trained model, its score beside the baselines, and a report."""

from collections.abc import Iterator
from typing import Any, Literal

from lmjax.config import UserError, config
from lmjax.console import RunLog
from lmjax.data import Data
from lmjax.evaluation.evaluator import Evaluator
from lmjax.jobs.settings import Evaluation
from lmjax.jobs.text import (
    check_special_tokens,
    prepare_text,
    print_rows,
    warn_of_answers,
    warn_of_losses,
)
from lmjax.jobs.training_job import TrainingJob
from lmjax.models.transformer import NO_HEAD
from lmjax.objectives import CausalLM, Example, TextObjective
from lmjax.parallel import training_layout
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed
from lmjax.training.gradients import count_microbatches
from lmjax.training.schedules import Rate, count_full_batches, piecewise_linear


@config
class Pretrain(TrainingJob):
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
        longest = self.model.max_length
        if longest is not None and self.data.length > longest:
            raise UserError(
                f"data.length={self.data.length} is longer than model.max_length={longest}"
            )
        if not self.model.word_head:
            raise UserError(NO_HEAD)
        super().validate()

    def example_shapes(self) -> Example:
        """See `TrainingJob.example_shapes`."""
        return self.objective.shapes(self.largest_batch(), self.data.length)

    def largest_batch(self) -> int:
        """Rows of the largest example."""
        return max(self.data.sizes)

    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> TextFeed:
        """See `TrainingJob.prepare`."""
        warn_of_answers(log, self.data, self.objective)
        prepared = prepare_text(self.data, folder.tokenizer, self.model.vocab_size, log, saved)
        plan, length = self.data.plan(self.seed), self.data.length
        feed = TextFeed(prepared, plan, self.objective, length, self.microbatch)
        check_special_tokens(feed)
        print_rows(log, feed)
        warn_of_losses(log, prepared, self.objective.predicts_text)
        return feed

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

    def check_batches(self, done: int) -> None:
        """Raises UserError if an example after `done` steps does not divide among the devices.

        Batches of a ramp that lie before do not count: a run whose batch has grown may go on with
        more devices than it could begin with.
        """
        plan, layout = self.data.plan(self.seed), training_layout()
        coming = [row.batch_size for row in plan.table if row.first_step > done]
        for rows in (plan.batch_size(done), *coming):
            count_microbatches(rows, self.microbatch, layout)

    def facts(self) -> Iterator[tuple[str, str]]:
        """See `TrainingJob.facts`."""
        rows = self.data.plan(self.seed).row0(self.steps)
        low, high = min(self.data.sizes), max(self.data.sizes)
        sizes = high if low == high else f"{low} to {high}"
        yield (
            "training",
            f"{self.steps:,} steps of {sizes} x {self.data.length} tokens, "
            f"{rows * self.data.length:,} in all",
        )
