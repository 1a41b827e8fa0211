"""Classification of texts: from a pretrained model and labelled texts to a classifier."""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog
from lmjax.data import Data, LabelledTexts
from lmjax.data.labelled_texts import common_names
from lmjax.evaluation.evaluator import Evaluator
from lmjax.evaluation.held_out import HeldOutLoss
from lmjax.evaluation.label_measures import ClassMeasures, NumberMeasures
from lmjax.interop.folder import model_folder
from lmjax.jobs.begin_with import with_starting_model
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.labelled_data import check_head, log_classes, sources_of, with_labels
from lmjax.jobs.refilling_model import with_special_tokens
from lmjax.jobs.tag_coverage import coverage_of
from lmjax.jobs.training_job import FrozenModel
from lmjax.models import TextHeadConfig, TransformerConfig
from lmjax.objectives import Regression, TextLabels
from lmjax.objectives.text_labels import FILLER
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed
from lmjax.training.schedules import Cosine, Schedule


@config
class Classify(Finetune):
    """Train a pretrained model to tell the class of texts, or a number of each.

    Unless it is given, the model is that of `begin_with`. It gets a head of texts in place of its
    other heads, unless it is given with one of that name: on the last token of a causal model; on
    the first token of an encoder, with a pooler. The head keeps the names of the classes. Numbers
    are learnt with kind=number of the sources and objective.objective=Regression.
    """

    objective: TextLabels = TextLabels()  # what it is trained to do
    data: Data  # labelled texts, with data.rows=groups
    schedule: Schedule = Cosine(peak=2e-5, warmup=0)  # the learning rate (BERT)

    def validate(self) -> None:
        """Raises UserError for texts without labels, or labels of another kind."""
        kind = "number" if self.is_regression else "class"
        for source in sources_of(self.data):
            if not isinstance(source, LabelledTexts):
                raise UserError(
                    f"data.train: {type(source).__name__} has no labels; take LabelledTexts, or"
                    " LabelledTable"
                )
            if source.kind != kind:
                name = type(self.objective.objective).__name__
                raise UserError(
                    f"objective.objective={name} learns kind={kind} of a source; there is"
                    f" kind={source.kind}"
                )
        super().validate()

    @property
    def is_regression(self) -> bool:
        """Returns whether numbers are learnt, and not classes."""
        return isinstance(self.objective.objective, Regression)

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Loss, accuracy and confusions on held-out texts, or errors; and further ones."""
        self.evaluation.refuse_tasks("a classifier")
        every, tokens = self.evaluation.every, self.evaluation.tokens
        classes = ClassMeasures(every=every, tokens=tokens)
        measures = NumberMeasures() if self.is_regression else classes
        loss = HeldOutLoss(every=every, tokens=tokens)
        return (loss, measures, *coverage_of(self.data), *self.evaluators)

    @property
    def head_name(self) -> str:
        """See `Finetune.head_name`."""
        return self.objective.objective.head

    def with_model(self) -> Classify:
        """See `Finetune.with_model`; all sources get the names of the classes."""
        names = common_names(sources_of(self.data))
        outputs = 1 if self.is_regression else len(names)

        def with_head(model: TransformerConfig) -> TransformerConfig:
            causal = model.attention.causal
            head = TextHeadConfig(
                name=self.head_name,
                outputs=outputs,
                labels=names,
                token="last" if causal else "first",
                pooler=not causal,
                bias=not causal,
                dropout=0.0 if causal else model.dropout,
                problem="regression" if self.is_regression else None,
            )
            keeps = self.objective.words > 0
            return replace(model, word_head=keeps, classifier=None, heads=(head,))

        job = replace(self, data=with_labels(self.data, names))
        job = with_special_tokens(with_starting_model(job, with_head, self.lacks_head))
        check_head(job.objective.objective.head_of(job.model), outputs, names, "texts")
        return job

    def frozen_models(self) -> dict[str, FrozenModel]:
        """See `TrainingJob.frozen_models`: the model that an augmentation refills with."""
        augmentation = self.objective.augmentation
        if augmentation is None or augmentation.refill_with is None:
            return {}
        folder = augmentation.refill_with
        return {FILLER: FrozenModel(model_folder(folder), folder)}

    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> TextFeed:
        """See `TrainingJob.prepare`."""
        if names := common_names(sources_of(self.data)):
            log_classes(log, names)
        return super().prepare(folder, log, saved)
