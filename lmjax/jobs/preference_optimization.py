"""Direct preference optimisation: a policy learns from comparisons, without a reward model."""

from __future__ import annotations

from lmjax.alignment.comparison_accuracy import ComparisonAccuracy
from lmjax.alignment.preference_objective import PreferencePairs
from lmjax.config import config
from lmjax.data import Data
from lmjax.evaluation.evaluator import Evaluator
from lmjax.evaluation.held_out import HeldOutLoss
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.training_job import FrozenModel
from lmjax.training.schedules import Cosine, Schedule

REFERENCE = "reference"


@config
class PreferenceOptimization(Finetune):
    """Train a model to prefer better answers to worse ones: DPO, IPO, SimPO, ORPO.

    The reference policy of the losses that have one is the model of `begin_with`.
    """

    objective: PreferencePairs = PreferencePairs()  # what it is trained to do
    data: Data  # comparisons, with data.rows=groups
    schedule: Schedule = Cosine(peak=1e-6, warmup=0)  # the learning rate

    def frozen_models(self) -> dict[str, FrozenModel]:
        """See `TrainingJob.frozen_models`: the reference."""
        if not self.objective.preference.reads_reference:
            return {}
        return {REFERENCE: FrozenModel(self.model, self.begin_with)}

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Loss and accuracy on held-out comparisons, and further ones."""
        every, tokens = self.evaluation.every, self.evaluation.tokens
        return (HeldOutLoss(every=every, tokens=tokens), ComparisonAccuracy(), *self.evaluators)
