"""Reward models: from a fine-tuned model and comparisons of answers to a score of an answer."""

from __future__ import annotations

from lmjax.alignment.comparison_accuracy import ComparisonAccuracy
from lmjax.alignment.reward_ranking import RewardRanking
from lmjax.alignment.reward_report import RewardReport
from lmjax.config import config, replace
from lmjax.data import Data
from lmjax.evaluation.evaluator import Evaluator
from lmjax.evaluation.held_out import HeldOutLoss
from lmjax.jobs.begin_with import with_starting_model
from lmjax.jobs.finetune import Finetune
from lmjax.models import TextHeadConfig, TransformerConfig
from lmjax.training.schedules import Cosine, Schedule


@config
class RewardModel(Finetune):
    """Train a model to score answers as people rank them.

    Unless it is given, the model is that of `begin_with`. It gets one number at the last token in
    place of its head of words, unless it is given with a head of that name. Another reward model
    keeps its head: it may have been trained on comparisons that cost nothing (`DamagedTexts`), or
    on ranked pages of the web.
    """

    objective: RewardRanking = RewardRanking()  # what it is trained to do
    data: Data  # comparisons, with data.rows=groups
    schedule: Schedule = Cosine(peak=9e-6, warmup=0)  # the learning rate (InstructGPT)

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Loss, accuracy, calibration and bias on held-out comparisons, and further ones."""
        self.evaluation.refuse_tasks("a reward model")
        every, tokens = self.evaluation.every, self.evaluation.tokens
        measured = HeldOutLoss(every=every, tokens=tokens), ComparisonAccuracy()
        return (*measured, RewardReport(tokens=tokens), *self.evaluators)

    @property
    def head_name(self) -> str:
        """See `Finetune.head_name`."""
        return self.objective.head

    def with_model(self) -> RewardModel:
        """See `Finetune.with_model`."""
        head = TextHeadConfig(name=self.head_name, outputs=1, bias=False)

        def with_head(model: TransformerConfig) -> TransformerConfig:
            return replace(model, word_head=False, heads=(head,))

        return with_starting_model(self, with_head, self.lacks_head)
