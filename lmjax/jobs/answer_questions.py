"""Answers that are parts of a text: from a pretrained model and questions to a model that finds."""

from __future__ import annotations

from lmjax.config import UserError, config, replace
from lmjax.data import Data
from lmjax.data.questions import Questions
from lmjax.evaluation.answer_measures import AnswerMeasures
from lmjax.evaluation.evaluator import Evaluator
from lmjax.evaluation.held_out import HeldOutLoss
from lmjax.jobs.begin_with import with_starting_model
from lmjax.jobs.finetune import Finetune
from lmjax.models import SpanHeadConfig, TransformerConfig
from lmjax.objectives.text_spans import TextSpans
from lmjax.training.schedules import Cosine, Schedule


@config
class AnswerQuestions(Finetune):
    """Train a pretrained model to find the answer to a question in a text (SQuAD).

    Unless it is given, the model is that of `begin_with`. It gets a head of spans in place of its
    other heads, unless it is given with one of that name.
    """

    objective: TextSpans = TextSpans()  # what it is trained to do
    data: Data  # questions, with data.rows=groups
    schedule: Schedule = Cosine(peak=3e-5, warmup=0)  # the learning rate

    def validate(self) -> None:
        """Raises UserError for texts that are no questions."""
        for domain in self.data.train:
            if not isinstance(domain.source, Questions):
                raise UserError(
                    f"data.train: {type(domain.source).__name__} has no questions with answers in"
                    " a context; take Questions"
                )
        super().validate()

    def all_evaluators(self) -> tuple[Evaluator, ...]:
        """Loss, exact match and F1 on held-out questions, and further ones."""
        self.evaluation.refuse_tasks("a model that finds spans")
        every, tokens = self.evaluation.every, self.evaluation.tokens
        measures = AnswerMeasures(every=every, tokens=tokens)
        return (HeldOutLoss(every=every, tokens=tokens), measures, *self.evaluators)

    @property
    def head_name(self) -> str:
        """See `Finetune.head_name`."""
        return self.objective.objective.head

    def with_model(self) -> AnswerQuestions:
        """See `Finetune.with_model`."""

        def with_head(model: TransformerConfig) -> TransformerConfig:
            head = SpanHeadConfig(name=self.head_name)
            return replace(model, word_head=False, classifier=None, heads=(head,))

        return with_starting_model(self, with_head, self.lacks_head)
