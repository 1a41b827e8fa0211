"""Feeds: the examples of a run by step."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.config import to_json
from lmjax.data import Loader, PreparedData
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.chat.templated import template_of
from lmjax.data.mixture import Mixture
from lmjax.data.plan import Plan
from lmjax.data.rows import RowFormat, RowReader
from lmjax.data.store import TokenStore
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
class StoreFeed(Feed):
    """Base of the feeds that read token stores.

    Attributes:
      prepared: tokenizer and token stores.
      plan: which rows a step takes.
    """

    prepared: PreparedData
    plan: Plan

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the text."""
        return self.prepared.tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of tokenizer and text, and the plan."""
        return {
            "plan": json.loads(to_json(self.plan)),
            "tokenizer": self.tokenizer.fingerprint,
            "text": self.prepared.fingerprints,
        }


@dataclasses.dataclass(frozen=True)
class TextFeed(StoreFeed):
    """Rows of stored text, prepared by an objective.

    Attributes:
      objective: makes examples of the rows.
      length: tokens that the model reads in a row.
      batch_size: rows that are computed at once, in evaluations too.
    """

    objective: TextObjective
    length: int
    batch_size: int

    @functools.cached_property
    def lexicon(self) -> TokenTable:
        """Special tokens, as the objective looks them up."""
        return TokenTable.of(self.tokenizer)

    @functools.cached_property
    def preparation(self) -> Preparation:
        """Makes an example of rows."""
        return self.objective.preparation(self.lexicon, self.length)

    @functools.cached_property
    def loader(self) -> Loader:
        """Makes this process's rows of any step."""
        return self.prepared.loader(
            self.plan,
            self.preparation,
            self.objective.row_format(self.length),
            jax.process_index(),
            jax.process_count(),
        )

    @contextmanager
    def examples(self, done: int) -> Iterator[Iterator[Example]]:
        """See `Feed.examples`."""
        with self.loader.iterate(done) as batches:
            yield (example for _, example in batches)


class RolloutRequest(NamedTuple):
    """Beginning of a text that a model is to go on from.

    Attributes:
      tokens: of the text.
      text: that the tokens were made of.
      metadata: further fields of its line.
    """

    tokens: list[int]
    text: str
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RequestFeed(StoreFeed):
    """Requests of stored texts, the same ones of a step in every process.

    Attributes:
      length: most tokens of a request; longer ones are cut at their beginning, or left out, as
        `data.long_documents` says.
    """

    length: int

    @functools.cached_property
    def template(self) -> ChatFormat | None:
        """Chat format of the requests; None: they are no conversations."""
        return template_of(self.prepared.data)

    @functools.cached_property
    def mixture(self) -> Mixture:
        """Order of the requests."""
        return self.prepared.loader(self.plan, tuple, self._rows).mixture

    @functools.cached_property
    def held_out_rows(self) -> dict[str, RowReader]:
        """Requests of each held-out set, one a row."""
        stores = self.prepared.held_out
        return {name: self.prepared.reader(store, self._rows) for name, store in stores.items()}

    @property
    def _rows(self) -> RowFormat:
        return RowFormat(self.length, slots=1)

    def requests(self, step: int) -> list[RolloutRequest]:
        """The requests of a step, counted from 0."""
        rows = self.plan.rows(step)
        found: list[RolloutRequest | None] = [None] * len(rows)
        for here, reader, index, _ in self.mixture.by_source(rows, self.plan.seed):
            for row, document in zip(here, reader.documents(index), strict=True):
                found[row] = self._request(reader.store, int(document))
        return found

    def held_out(self, name: str, count: int) -> list[RolloutRequest]:
        """The first requests of a held-out set."""
        reader = self.held_out_rows[name]
        documents = reader.documents(np.arange(min(count, reader.count)))
        return [self._request(reader.store, int(document)) for document in documents]

    def _request(self, store: TokenStore, document: int) -> RolloutRequest:
        begin, end = store.offsets[document : document + 2]
        tokens = store.tokens[max(begin, end - self.length) : end].tolist()
        return RolloutRequest(tokens, self.tokenizer.decode(tokens), store.metadata(document))

    @contextmanager
    def examples(self, done: int) -> Iterator[Iterator[list[RolloutRequest]]]:
        """See `Feed.examples`: the requests of each step."""
        yield map(self.requests, itertools.count(done))
