"""Classification of words: from a pretrained model and labelled words to a tagger."""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog
from lmjax.data import Data, LabelledTokens
from lmjax.data.labelled_tokens import common_sets
from lmjax.evaluation.evaluator import Evaluator
from lmjax.evaluation.held_out import HeldOutLoss
from lmjax.evaluation.token_measures import TokenMeasures
from lmjax.jobs.begin_with import with_starting_model
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.labelled_data import check_head, log_classes, sources_of, with_labels
from lmjax.jobs.tag_coverage import coverage_of
from lmjax.models import TokenHeadConfig, TransformerConfig
from lmjax.objectives import TokenLabels
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed
from lmjax.training.schedules import Cosine, Schedule


@config
class ClassifyTokens(Finetune):
    """Train a pretrained model to tell the class of words: parts of speech, entities, both.

    Unless it is given, the model is that of `begin_with`. It gets a head for each set of classes in
    place of its other heads, unless it is given with those of their names. The heads keep the names
    of the classes. Several sets are learnt at once with
    objective.objectives='(Classification(head="pos"), Classification(head="entity"))'.
    """

    objective: TokenLabels = TokenLabels()  # what it is trained to do
    data: Data  # texts whose words have labels, with data.rows=groups
    schedule: Schedule = Cosine(peak=5e-5, warmup=0)  # the learning rate (BERT)

    def validate(self) -> None:
        """Raises UserError for texts without such labels, or with other sets of them."""
        for source in sources_of(self.data):
            if not isinstance(source, LabelledTokens):
                raise UserError(
                    f"data.train: the words of {type(source).__name__} have no labels; take"
                    " LabelledTokens, or LabelledColumns"
                )
            if len(source.sets) != len(self.objective.objectives):
                heads = ", ".join(one.head for one in self.objective.objectives)
                raise UserError(
                    f"data.train: a source has {len(source.sets)} sets of labels"
                    f" ({', '.join(source.sets)}); objective.objectives has heads for {heads}"
                )
        super().validate()

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Loss, accuracy, confusions and entities of held-out texts, and further ones."""
        self.evaluation.refuse_tasks("a tagger")
        every, tokens = self.evaluation.every, self.evaluation.tokens
        measures = TokenMeasures(every=every, tokens=tokens)
        loss = HeldOutLoss(every=every, tokens=tokens)
        return (loss, measures, *coverage_of(self.data), *self.evaluators)

    def lacks_head(self, model: TransformerConfig) -> bool:
        """See `Finetune.lacks_head`."""
        there = {head.name for head in model.heads}
        return not there >= {one.head for one in self.objective.objectives}

    def with_model(self) -> ClassifyTokens:
        """See `Finetune.with_model`; all sources get the names of the classes."""
        sets = common_sets(sources_of(self.data))

        def with_heads(model: TransformerConfig) -> TransformerConfig:
            dropout = 0.0 if model.attention.causal else model.dropout
            heads = tuple(
                TokenHeadConfig(name=one.head, outputs=len(names), labels=names, dropout=dropout)
                for one, names in zip(self.objective.objectives, sets, strict=True)
            )
            return replace(model, word_head=False, classifier=None, heads=heads)

        job = replace(self, data=with_labels(self.data, sets))
        job = with_starting_model(job, with_heads, self.lacks_head)
        for one, names in zip(job.objective.objectives, sets, strict=True):
            check_head(one.head_of(job.model), len(names), names, "words")
        if job.objective.at is None:
            at = "last" if job.model.attention.causal else "first"
            job = replace(job, objective=replace(job.objective, at=at))
        return job

    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> TextFeed:
        """See `TrainingJob.prepare`."""
        sets = common_sets(sources_of(self.data))
        for one, names in zip(self.objective.objectives, sets, strict=True):
            log_classes(log, names, f"{one.head}: ")
        return super().prepare(folder, log, saved)
