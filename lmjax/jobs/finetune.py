"""Supervised fine-tuning: from a pretrained model and conversations to a model that replies."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from lmjax.alignment.comparison_rows import ComparisonObjective
from lmjax.config import UserError, config, replace
from lmjax.console import RunLog, make_console
from lmjax.data import Conversations, Data, prepare
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.folder import (
    DEFAULT,
    TEMPLATE_FILE,
    FolderTemplate,
    Template,
    read_templates,
    write_templates,
)
from lmjax.data.chat.jinja_source import jinja_source
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.chat.templated import template_of
from lmjax.data.chat.templates import ChatTemplate
from lmjax.data.chat.tfds_conversations import TFDSConversations
from lmjax.data.spans import KINDS
from lmjax.data.store import TokenStore
from lmjax.evaluation.evaluator import Evaluator
from lmjax.jobs.begin_with import warn_of_format, with_starting_model
from lmjax.jobs.settings import ChatEvaluation
from lmjax.jobs.tag_coverage import coverage_of, tell_coverage
from lmjax.jobs.text_job import TextJob
from lmjax.launch import is_first
from lmjax.models import TransformerConfig
from lmjax.objectives import ChatLM, TextObjective
from lmjax.remote import local_copy
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed
from lmjax.training.schedules import Cosine, Schedule

WRITTEN = Conversations, TFDSConversations, Comparisons  # sources of texts in a chat format


@config
class Finetune(TextJob):
    """Train a pretrained model on conversations, to write the replies in them.

    Unless they are given, the model and its tokenizer are those of `begin_with`, and the number of
    steps follows from `epochs`.
    """

    steps: int | None = None  # updates of the parameters; None: what `epochs` takes
    epochs: float | None = None  # times that the first domain of data.train is read
    model: TransformerConfig | None = None  # what is trained; None: the model of begin_with
    objective: TextObjective = ChatLM()  # what it is trained to do
    data: Data  # conversations, perhaps with text, in rows of whole documents
    schedule: Schedule = Cosine(peak=2e-5, warmup=0)  # the learning rate
    evaluation: ChatEvaluation = ChatEvaluation()  # on conversations that were held out

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        if self.steps is None and self.epochs is None:
            raise UserError("give the length of the training: steps, or epochs")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"epochs={self.epochs}: it must be above 0")
        if self.epochs is not None and (self.data.stages or self.data.ramp):
            raise UserError("epochs are counted where data has no stages and no ramp: give steps")
        if self.model is None and self.begin_with is None:
            raise UserError("begin_with: give the folder of the model to fine-tune")
        rows = self.data.rows
        if self.objective.slots is not None and rows != "groups":
            name = type(self.objective).__name__
            raise UserError(f"data.rows={rows}: {name} reads data.rows=groups")
        if self.objective.slots is None and rows != "whole_documents":
            raise UserError(
                f"data.rows={rows} cuts conversations at the edges of rows: set "
                "data.rows=whole_documents"
            )
        weighted = [domain.name for domain in self.data.train if domain.loss_weights is not None]
        if weighted and not isinstance(self.objective, ChatLM):
            name = type(self.objective).__name__
            raise UserError(f"{weighted[0]}: loss_weights are read by ChatLM, not by {name}")
        template_of(self.data)
        super().validate()

    def check_model(self) -> None:
        """See `TrainingJob.check_model`; a model that `with_model` changes is checked then."""
        if self.model is not None and not self.lacks_head(self.model):
            super().check_model()

    @property
    def head_name(self) -> str | None:
        """Name of the head on labels that is trained; None: there is none."""
        return None

    def lacks_head(self, model: TransformerConfig) -> bool:
        """Returns whether a model that is given lacks the head that is trained, and gets it."""
        return self.head_name is not None and all(h.name != self.head_name for h in model.heads)

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Those of `evaluation`, and further ones."""
        return (*self.evaluation.evaluators(), *coverage_of(self.data), *self.evaluators)

    def resolved(self) -> Finetune:
        """See `TrainingJob.resolved`: with the model and the tokenizer of `begin_with`, and steps.

        The steps of `epochs` need the number of rows, so that the text is tokenized here.
        """
        job = super(Finetune, self.with_model()).resolved()
        if job.epochs is None:
            return job
        log = RunLog(make_console())
        with tempfile.TemporaryDirectory() as folder, log.phase("reading the text") as report:
            prepared = prepare(job.data, folder, report)
            plan, length = job.data.plan(job.seed), job.data.length
            feed = TextFeed(prepared, plan, job.objective, length, job.largest_batch())
            rows = feed.loader.mixture.rows_of_epochs(job.data.train[0].name, job.epochs)
        return replace(job, steps=-(-rows // job.data.batch_size))

    def explain(self) -> None:
        """See `TrainingJob.explain`."""
        super(Finetune, self.with_model()).explain()

    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> TextFeed:
        """See `TrainingJob.prepare`."""
        warn_of_format(self, log)
        for domain in self.data.train:
            if isinstance(source := domain.source, WRITTEN):
                title = source.template.title
                log.fact("format", f"{domain.name}: {source.layout()}, written as {title}")
        feed = super().prepare(folder, log, saved)
        if isinstance(self.objective, ComparisonObjective):
            held_out = feed.prepared.held_out.items()
            held_out = {f"held-out {name}": store for name, store in held_out}
            self.objective.check_stores(feed.prepared.train | held_out)
        tell_coverage(log, feed.prepared)
        for name, store in feed.prepared.train.items():
            if share := _share_of_replies(store):
                log.fact("replies", f"{name}: {share:.1%} of the tokens")
        if is_first():
            write_templates(folder.path, _templates(template_of(self.data)))
        return feed

    def with_model(self) -> Finetune:
        """The job with the model and the tokenizer of `begin_with`, where none are given."""
        return with_starting_model(self)


def _templates(template: ChatFormat | None) -> dict[str, Template]:
    """A format as the templates of a folder; none where it cannot be written so."""
    if isinstance(template, FolderTemplate):
        return read_templates(local_copy(template.path, "template.path"))
    source = jinja_source(template) if isinstance(template, ChatTemplate) else None
    return {} if source is None else {DEFAULT: Template(source, TEMPLATE_FILE)}


def _share_of_replies(store: TokenStore) -> float:
    """Share of a store's tokens that are replies."""
    first, end, kind = store.spans
    return float(np.sum((end - first)[kind == KINDS.index("assistant")])) / store.manifest.tokens
