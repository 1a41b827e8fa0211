"""The base of the jobs that train on rows of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog
from lmjax.data import Data
from lmjax.jobs.begin_with import tokenizer_of
from lmjax.jobs.text import (
    check_special_tokens,
    prepare_text,
    print_rows,
    warn_of_answers,
    warn_of_losses,
)
from lmjax.jobs.training_job import TrainingJob
from lmjax.models.transformer import NO_HEAD
from lmjax.objectives import Example, TextObjective
from lmjax.parallel import training_layout
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed
from lmjax.training.gradients import count_microbatches


@config
class TextJob(TrainingJob):
    """Train a model on text."""

    objective: TextObjective  # what it is trained to do
    data: Data  # the text, the tokenizer, the rows of a step

    def check_model(self) -> None:
        """See `TrainingJob.check_model`."""
        longest = self.model.max_length
        if longest is not None and self.data.length > longest:
            raise UserError(
                f"data.length={self.data.length} is longer than model.max_length={longest}"
            )
        if self.objective.predicts_words and not self.model.word_head:
            raise UserError(NO_HEAD)
        super().check_model()

    def resolved(self) -> TextJob:
        """See `TrainingJob.resolved`: with the teacher's tokenizer, where none is given."""
        if self.distillation is None:
            return self
        tokenizer = tokenizer_of(self.data.tokenizer, self.distillation.teacher)
        return replace(self, data=replace(self.data, tokenizer=tokenizer))

    def example_shapes(self) -> Example:
        """See `TrainingJob.example_shapes`."""
        return self.objective.shapes(self.largest_batch(), self.data.length)

    @property
    def lengths_vary(self) -> bool:
        """See `TrainingJob.lengths_vary`: rows that are texts of one slot each are."""
        return self.objective.slots is not None

    def largest_batch(self) -> int:
        """Rows of the largest example."""
        return max(self.data.sizes)

    def batch_sizes(self) -> Sequence[int]:
        """See `TrainingJob.batch_sizes`."""
        return self.data.sizes

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

    def check_batches(self, done: int) -> None:
        """Raises UserError if an example after `done` steps does not divide among the devices.

        Batches of a ramp that are over do not count: a run whose batch has grown may go on with
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
