"""Direct preference optimisation: a policy learns from comparisons, without a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lmjax.alignment.comparison_accuracy import ComparisonAccuracy
from lmjax.alignment.labelled_answers import LabelledAnswers, count_labels, most_answers
from lmjax.alignment.preference_objective import REFERENCE, PreferenceObjective, PreferencePairs
from lmjax.alignment.reference_cache import with_reference
from lmjax.config import UserError, config
from lmjax.console import RunLog
from lmjax.data import Data
from lmjax.data.store import TokenStore
from lmjax.evaluation.evaluator import Evaluator
from lmjax.evaluation.held_out import HeldOutLoss
from lmjax.jobs.begin_with import refuse_prefix_model
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.training_job import FrozenModel
from lmjax.parallel import training_layout
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed
from lmjax.training.schedules import Cosine, Schedule


@config
class PreferenceOptimization(Finetune):
    """Train a model to prefer better answers to worse ones: DPO, IPO, SimPO, ORPO, KTO.

    The reference policy of the losses that have one is the model of `begin_with`. What it says of
    the answers is computed before the first step, once for all runs, and it is in memory in
    training only for objectives that need it there (`LabelledAnswers`), or with
    reference=in_memory.
    """

    objective: PreferenceObjective = PreferencePairs()  # what it is trained to do
    data: Data  # comparisons, with data.rows=groups
    schedule: Schedule = Cosine(peak=1e-6, warmup=0)  # the learning rate
    # log-probabilities of the reference: computed once and kept in data.cache, or in every step
    reference: Literal["cached", "in_memory"] = "cached"

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        super().validate()
        if self.objective.reads_reference and self.begin_with is None:
            raise UserError("begin_with: give the folder of the reference policy, which is trained")
        # Held-out answers are measured in batches of a part.
        fewest = min(*self.data.sizes, self.microbatch)
        if isinstance(self.objective, LabelledAnswers) and fewest < 2:
            raise UserError(
                f"data.batch_size={self.data.batch_size} and accumulation={self.accumulation}: "
                "the divergence is estimated from the answers of other rows, so that a batch, "
                "and a part of it, must have at least 2"
            )

    def frozen_models(self) -> dict[str, FrozenModel]:
        """See `TrainingJob.frozen_models`: the reference, unless what it says is cached."""
        if not self.objective.reads_reference or self.caches_reference:
            return {}
        return {REFERENCE: FrozenModel(self.model, self.begin_with)}

    @property
    def caches_reference(self) -> bool:
        """Returns whether the reference scores the answers before the first step."""
        objective = self.objective
        needed = objective.reads_reference and not objective.keeps_reference
        return needed and self.reference == "cached"

    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> TextFeed:
        """See `TrainingJob.prepare`."""
        if self.objective.reads_reference:
            refuse_prefix_model(self.begin_with)
        feed = super().prepare(folder, log, saved)
        if isinstance(self.objective, LabelledAnswers):
            self.tell_of_labels(feed.prepared.train, log)
        if self.caches_reference:
            feed = with_reference(feed, self.model, self.begin_with, training_layout(), log)
        return feed

    def tell_of_labels(self, stores: Mapping[str, TokenStore], log: RunLog) -> None:
        """Logs how many answers are wanted, and whether slots are empty in all comparisons."""
        for name, store in stores.items():
            wanted, others = count_labels(store)
            log.fact("answers", f"{name}: {wanted:,} are wanted, {others:,} are not")
        slots, most = self.objective.answers, max(map(most_answers, stores.values()))
        if most < slots:
            log.warn(
                f"objective.answers={slots}, and no comparison has more than {most}: the others "
                f"are padding, which objective.answers={most} saves"
            )

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Loss and accuracy on held-out comparisons, and further ones."""
        every, tokens = self.evaluation.every, self.evaluation.tokens
        accuracy = (ComparisonAccuracy(),) if isinstance(self.objective, PreferencePairs) else ()
        loss = HeldOutLoss(every=every, tokens=tokens)
        return (loss, *accuracy, *self.evaluation.task_evaluators(), *self.evaluators)
