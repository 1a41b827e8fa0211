"""The base of tasks: test sets as prompts with examples, requests, and measures of the answers."""

from __future__ import annotations

import abc
import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from lmjax.config import UserError, config, to_json
from lmjax.evaluation.requests import ModelAnswer, ModelRequest
from lmjax.evaluation.tasks.harness_examples import SEED, harness_examples
from lmjax.evaluation.tasks.records import Record, read_records
from lmjax.remote import check_path

Kind = Literal["mean", "perplexity", "rate", "corpus"]
Drawing = Literal["once", "harness"]


class Measure(NamedTuple):
    """A number that a task gives.

    Attributes:
      name: of the number.
      more_is_better: whether the largest is the best; None: neither.
      kind: how items become one number: their mean; the perplexity of log-likelihoods; a rate,
        -sum(log-likelihood) / sum(count), whose base and exponent `per` says; or that of a corpus,
        `of` the sums of counts.
      per: what a rate is per, such as "word"; a perplexity is its exponential, and bits are its
        multiple by 1 / ln 2.
      of: the number of a corpus, such as BLEU, from the sums of its items' counts.
    """

    name: str
    more_is_better: bool | None = True
    kind: Kind = "mean"
    per: str = ""
    of: Callable[[np.ndarray], float] | None = None


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a test set.

    Attributes:
      prompt: the question as the model reads it, without examples.
      answer: how an example answers it, without the space before it.
      choices: answers to choose from; empty: the model writes one.
      gold: number of the right choice.
      subject: part of the test set.
      identity: where it comes from, for people.
      details: what else its task needs to measure an answer.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    subject: str = ""
    identity: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Question:
    """An item with its whole prompt and what is asked of the model.

    Attributes:
      item: the item.
      context: description, examples and the item's prompt.
      requests: what the model is asked.
      shots: number of examples in the context.
    """

    item: Item
    context: str
    requests: tuple[ModelRequest, ...]
    shots: int


Fits = Callable[[Question], bool]  # whether a model can read all that it is asked

# What one item gives by measure: a number, (log-likelihood, count) of a rate, or a corpus' counts.
ItemScores = dict[str, float | tuple[float, ...]]


@config
class EvaluationTask(abc.ABC):
    """Base of the tasks: a test set in files here, and how a model is asked and judged."""

    path: str  # the test set: a file, a folder, an archive, or tfds:NAME/SPLIT
    examples_path: str | None = None  # what examples are drawn from; none: other items of `path`
    shots: int = 0  # examples in front of each question
    fit: bool = False  # fewer of them where not all fit into the model's context
    limit: int | None = None  # only so many items of each subject, the first ones; none: all
    # how examples are drawn: the same for all questions, which are answered faster so; or for each
    # question others, as EleutherAI's harness does, with its prompts
    drawing: Drawing = "once"
    seed: int = 0  # of the drawing of the examples; 0: for the harness its usual one, 1234
    title: str = ""  # name in tables; empty: that of the class

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        check_path(self.path, "path")
        check_path(self.examples_path or "", "examples_path")
        if self.shots < 0:
            raise UserError(f"shots={self.shots}: must be 0 or more")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit}: must be at least 1, or none")

    @property
    def name(self) -> str:
        """Name of the task in tables."""
        return self.title or type(self).__name__

    measures: ClassVar[tuple[Measure, ...]] = ()

    def description(self, subject: str) -> str:
        """Text in front of the examples; it ends as it is to stand there."""
        return ""

    separator: ClassVar[str] = "\n\n"  # between examples
    delimiter: ClassVar[str] = " "  # between a question and its answer
    draws: ClassVar[bool] = True  # examples are drawn; else they are the first ones
    # EleutherAI's harness draws one example more than it shows where a set has no test part
    draws_one_more: ClassVar[bool] = False
    generates: ClassVar[bool] = False  # the model writes its answers

    @abc.abstractmethod
    def read_item(self, record: Record) -> Item | None:
        """The item of a record; None: it is left out. UserError: a field is missing or wrong."""

    @abc.abstractmethod
    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """Requests of an item behind its whole context."""

    @abc.abstractmethod
    def measure(self, item: Item, answers: Sequence[ModelAnswer]) -> ItemScores:
        """Scores of an item by measure, from the answers to its requests."""

    def read_items(self, path: str) -> list[Item]:
        """All items of a file; UserError: it cannot be read, or has none."""
        items = [item for record in read_records(path) if (item := self.read_item(record))]
        if not items:
            raise UserError(f"{self.name}: there is no item in {path}")
        return items

    def left_out(self) -> int:
        """Number of the records of `path` that are no items of the task."""
        return 0

    def questions(self, fits: Fits | None = None) -> list[Question]:
        """The items with their prompts: the same whenever they are made.

        Args:
          fits: of a model; None: its context is no matter. Only for `fit`.

        Raises:
          UserError: a file cannot be read, or has fewer examples than `shots`.
        """
        items = self.read_items(self.path)
        pool = items
        if self.shots and self.examples_path is not None:
            pool = self.read_items(self.examples_path)
        examples_of = self._sampler(pool)
        counts: dict[str, int] = {}
        questions: list[Question] = []
        for item in items:
            counts[item.subject] = counts.get(item.subject, 0) + 1
            if self.limit is not None and counts[item.subject] > self.limit:
                continue
            examples = examples_of(item)
            if self.fit and fits is not None:
                # Most questions have room for as many as the one before.
                begin = questions[-1].shots if questions else len(examples)
                examples = examples[: self._number_that_fits(item, examples, begin, fits)]
            questions.append(self._question(item, examples))
        return questions

    def _question(self, item: Item, examples: Sequence[Item]) -> Question:
        context = self.context(item, examples)
        return Question(item, context, self.requests(item, context), len(examples))

    def _number_that_fits(
        self, item: Item, examples: Sequence[Item], begin: int, fits: Fits
    ) -> int:
        """Most examples with which an item fits; 0 also where it does not fit by itself."""
        number = min(begin, len(examples))
        while number < len(examples) and fits(self._question(item, examples[: number + 1])):
            number += 1
        while number > 0 and not fits(self._question(item, examples[:number])):
            number -= 1
        return number

    def _sampler(self, pool: Sequence[Item]) -> Callable[[Item], list[Item]]:
        """A function that gives the examples of one item after another, in their order."""
        by_subject: dict[str, list[Item]] = {}
        for one in pool:
            by_subject.setdefault(one.subject, []).append(one)
        if not self.shots:
            return lambda item: []
        if self.drawing == "once":
            drawn = {subject: self._drawn(found, subject) for subject, found in by_subject.items()}
            return lambda item: self._examples(item, drawn.get(item.subject, []))
        # A subject is a task of the harness.
        streams = {subject: random.Random(self.seed or SEED) for subject in by_subject}
        is_own = self.draws_one_more or self.examples_path in (None, self.path)

        def draw(item: Item) -> list[Item]:
            stream = streams.get(item.subject) if self.draws else None
            is_question = functools.partial(_is_same, item) if is_own else None
            found = by_subject.get(item.subject, [])
            return self._enough(item, harness_examples(found, self.shots, stream, is_question))

        return draw

    def _drawn(self, pool: Sequence[Item], subject: str) -> list[Item]:
        """Examples of a subject in the order of use, with spare ones behind them."""
        if not self.draws:
            return list(pool)
        # One drawing for all items: what they have in common is computed once.
        generator = random.Random(f"{self.seed} {subject}")
        return generator.sample(list(pool), len(pool))

    def _examples(self, item: Item, drawn: Sequence[Item]) -> list[Item]:
        """Examples of an item, which is none of them, whatever file it comes from."""
        others = [one for one in drawn[: self.shots + 8] if self.may_show(one, item)]
        if len(others) < self.shots:
            others = [one for one in drawn if self.may_show(one, item)]
        return self._enough(item, others)[: self.shots]

    def _enough(self, item: Item, others: list[Item]) -> list[Item]:
        """The examples of an item. UserError: they are fewer than wanted."""
        if len(others) < self.shots:
            source = self.examples_path or self.path
            whose = f" of {item.subject}" if item.subject else ""
            raise UserError(
                f"{self.name}: shots={self.shots}, but {source} has {len(others)} examples{whose} "
                "besides the question itself"
            )
        return others

    def may_show(self, example: Item, item: Item) -> bool:
        """Returns whether an item may be an example in front of another, which it tells nothing."""
        return (example.prompt, example.choices) != (item.prompt, item.choices)

    def context(self, item: Item, examples: Sequence[Item]) -> str:
        """Description, examples and question."""
        shown = [one.prompt + self.delimiter + one.answer + self.separator for one in examples]
        return self.opening(item) + "".join(shown) + item.prompt

    def opening(self, item: Item) -> str:
        """Text in front of the examples of an item."""
        return self.description(item.subject)

    def stop_rule(self) -> str:
        """Description of where a written answer ends; empty: nothing is written."""
        return ""

    def chance(self, item: Item) -> ItemScores:
        """Expected scores of a model that guesses; empty where it has none."""
        return {}

    def people(self, item: Item) -> ItemScores:
        """Scores of people, from the test set's own answers; empty where it does not say."""
        return {}

    def group(self, subject: str) -> str:
        """The group of subjects that one belongs to; empty: there are no groups."""
        return ""

    def settings(self) -> str:
        """All that decides about questions and measures, for a fingerprint, as JSON."""
        return to_json(self)


def _is_same(one: Item, other: Item) -> bool:
    """Returns whether two items are the same but for where they stand."""
    return dataclasses.replace(one, identity=other.identity) == other
