"""Feeds: the examples of a run by step."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax

from lmjax.config import to_json
from lmjax.data import Loader, PreparedData
from lmjax.data.plan import Plan
from lmjax.data.tokenizers import Tokenizer
from lmjax.objectives import Example, TextObjective, TokenTable
from lmjax.objectives.objective import Preparation


class Feed(abc.ABC):
    """Base of the feeds: examples as a pure function of the step, so that a run can go on."""

    @abc.abstractmethod
    def examples(self, done: int) -> AbstractContextManager[Iterator[Example]]:
        """This process's rows of the examples after `done` steps, one after another, in numpy."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the text; None where examples hold no text."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps of the data."""
        return {}


@dataclasses.dataclass(frozen=True)
class TextFeed(Feed):
    """Rows of stored text, prepared by an objective.

    Attributes:
      prepared: tokenizer and token stores.
      plan: which rows a step takes.
      objective: makes examples of the rows.
      length: tokens that the model reads in a row.
      batch_size: rows that are computed at once, in evaluations too.
    """

    prepared: PreparedData
    plan: Plan
    objective: TextObjective
    length: int
    batch_size: int

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the text."""
        return self.prepared.tokenizer

    @functools.cached_property
    def lexicon(self) -> TokenTable:
        """Special tokens, as the objective looks them up."""
        return TokenTable.of(self.tokenizer)

    @functools.cached_property
    def preparation(self) -> Preparation:
        """Makes an example of rows."""
        return self.objective.preparation(self.lexicon, self.length)

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of tokenizer and text, and the plan."""
        return {
            "plan": json.loads(to_json(self.plan)),
            "tokenizer": self.tokenizer.fingerprint,
            "text": self.prepared.fingerprints,
        }

    @functools.cached_property
    def loader(self) -> Loader:
        """Makes this process's rows of any step."""
        return self.prepared.loader(
            self.plan,
            self.preparation,
            self.objective.row_length(self.length),
            self.objective.row_overlap(self.length),
            jax.process_index(),
            jax.process_count(),
            self.objective.reads_spans,
            self.objective.row_room(self.length),
            self.objective.slots,
        )

    @contextmanager
    def examples(self, done: int) -> Iterator[Iterator[Example]]:
        """See `Feed.examples`."""
        with self.loader.iterate(done) as batches:
            yield (example for _, example in batches)
