"""Tasks that a training run evaluates its model on."""

from __future__ import annotations

from collections.abc import Sequence

from lmjax.config import UserError, config
from lmjax.console import Table
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.answering import Answering, prompt_room
from lmjax.evaluation.blank_scorers import tokens_read
from lmjax.evaluation.boundary import beginning_of, text_tokens, token_pairs
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator, Record
from lmjax.evaluation.likelihood import check_causal
from lmjax.evaluation.requests import ContinuationRequest, RollingRequest, WrittenRequest
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.task_tables import interval_table, score_table
from lmjax.evaluation.tasks.task import EvaluationTask, Fits, Question
from lmjax.generation.fill import Infiller, infiller_of
from lmjax.generation.generator import Generator
from lmjax.generation.text import TextGenerator
from lmjax.launch import is_first
from lmjax.training.feed import TextFeed

MODEL = "the model"  # the name of it in tables
TASKS = "tasks/"  # before the name of a task, as the split of its scores


@config
class Tasks(Evaluator):
    """Scores of the model in tasks, at intervals and at the end; questions stay the same."""

    tasks: tuple[EvaluationTask, ...] = ()  # what it is asked
    batch_size: int = 32  # most rows that are run at once

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed`.

        Raises:
          UserError: no task, one of another's name, files that cannot be read, or a model that does
            neither continue texts nor fill blanks.
        """
        check_tasks(self.tasks)
        feed: TextFeed = context.feed
        model = context.learner.model
        filling = infiller_of(feed.objective)
        if filling is None:
            check_causal(model)
        fits = fits_into(feed.tokenizer, model.max_length, filling=filling)
        questions = [task.questions(fits) for task in self.tasks]
        for task, asked in zip(self.tasks, questions, strict=True):
            check_room(task, asked, feed.tokenizer, model.max_length, filling)

        def evaluate(step: int, params: dict) -> tuple[Record | Table, ...]:
            prefix = feed.objective.reads_prefix
            trained = Generator(model, params, merge=False)
            text = TextGenerator(trained, feed.tokenizer, filling, reads_prefix=prefix)
            answering = Answering(text, self.batch_size)
            found = [
                result_of(task, asked, answering)
                for task, asked in zip(self.tasks, questions, strict=True)
            ]
            if not is_first():
                return ()
            tables = (
                *(score_table({MODEL: found}, better) for better in (True, False)),
                interval_table(MODEL, found),
            )
            return (*map(record_of, found), *(table for table in tables if table is not None))

        return evaluate


def check_tasks(tasks: tuple[EvaluationTask, ...]) -> None:
    """Raises UserError for no task, or two of one name."""
    if not tasks:
        raise UserError("tasks: give one or more, as in 'tasks=(Arc(path=\"arc.jsonl\"),)'")
    names = [f"{task.name} {task.shots}" for task in tasks]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"tasks: two have the name {double.split()[0]!r}: give one a title")


def check_room(
    task: EvaluationTask,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    longest: int | None,
    filling: Infiller | None = None,
) -> None:
    """Raises UserError where a model cannot read the shortest question, or not answer it.

    Args:
      task: the task.
      questions: as the model is asked them.
      tokenizer: of the model.
      longest: tokens that it reads; None: any number.
      filling: see `fits_into`.
    """
    if not any(question.item.prompt for question in questions):
        return
    shortest = min(questions, key=lambda question: len(question.item.prompt))
    for request in shortest.requests[:1]:
        if isinstance(request, RollingRequest):
            return  # whole texts are read in windows
        written = isinstance(request, WrittenRequest)
        most = request.max_tokens if written else 0
        room = prompt_room(longest, most, filling) if written else longest
        if room is None:
            return
        text = shortest.item.prompt  # examples may be cut
        if not shortest.shots:
            text = request.prompt if written else request.context
        tokens = text_tokens(tokenizer, text, request.special)
        if len(tokens) > room:
            raise UserError(
                f"{task.name}: the shortest question has {len(tokens)} tokens; the model reads "
                f"{longest}{f', of which the answer may take {most}' * written}"
            )


def fits_into(
    tokenizer: Tokenizer,
    longest: int | None,
    begin: int | None = None,
    filling: Infiller | None = None,
) -> Fits:
    """A function that says whether a context of `longest` tokens holds all of a question.

    Args:
      tokenizer: of the model.
      longest: tokens that it reads; None: any number.
      begin: see `beginning_of`.
      filling: how the model fills blanks, whose markers need room too; None: it continues texts.
    """

    def fits(question: Question) -> bool:
        if longest is None:
            return True
        scored = [one for one in question.requests if isinstance(one, ContinuationRequest)]
        pairs = token_pairs(tokenizer, scored, beginning_of(tokenizer, begin))
        sizes = [tokens_read(pair, tokenizer, filling) for pair in pairs]
        written = [one for one in question.requests if isinstance(one, WrittenRequest)]
        return max(sizes, default=0) <= longest and all(
            len(text_tokens(tokenizer, one.prompt, one.special))
            <= prompt_room(longest, one.max_tokens, filling)
            for one in written
        )

    return fits


def result_of(task: EvaluationTask, questions: list[Question], answering: Answering) -> TaskResult:
    """The result of a model in a task, asked anew."""
    requests = [request for question in questions for request in question.requests]
    answers = iter(answering.answers(requests))
    given = [[next(answers) for _ in question.requests] for question in questions]
    return TaskResult.of(task, questions, given)


def record_of(result: TaskResult) -> Record:
    """Scores of a task as a line of metrics.jsonl, without its step."""
    scores = {m.name: result.estimate(m).value for m in result.task.measures}
    return {"split": TASKS + result.task.name, **scores, "items": len(result.questions)}
