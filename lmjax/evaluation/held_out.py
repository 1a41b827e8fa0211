"""Loss and bits per byte on held-out token stores, on whatever mesh the model lies on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from lmjax.config import UserError, config
from lmjax.data.permutation import random_bits
from lmjax.data.rows import EvaluationRows, Ring, RowFormat, RowReader
from lmjax.data.store import TokenStore
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator, Record
from lmjax.objectives import Example, Sums, TextObjective, TokenTable
from lmjax.parallel import Layout
from lmjax.training.feed import TextFeed
from lmjax.training.placement import shortened, to_devices

HELD_OUT = "held_out/"  # before the name of a set, as the split of its metrics


def ring(store: TokenStore, rows: RowFormat) -> Ring:
    """Rows in which each token of a store is a target once."""
    return Ring(store, rows.length, rows.overlap)


@dataclasses.dataclass(frozen=True)
class Score:
    """Loss of a model on one set.

    Attributes:
      loss: nats per predicted token, without regularisers.
      bits_per_byte: bits for the text, its ends of documents included, per byte of UTF-8; None
        where the objective does not predict all of the text, or the tokens do not hold it.
      tokens: number of tokens that were predicted, or of what the objective counts.
      withheld: why there are no bits per byte, where the tokens are the reason; otherwise empty.
      measures: further means over the targets, by name.
      counts: what `tokens` counts.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    withheld: str = ""
    measures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    counts: str = "tokens"

    def record(self, name: str) -> Record:
        """A line of metrics.jsonl for the set of that name, without its step."""
        return {
            "split": HELD_OUT + name,
            "loss": self.loss,
            **({} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}),
            **({"withheld": self.withheld} if self.withheld else {}),
            **self.measures,
            self.counts: self.tokens,
        }


@config
class HeldOutLoss(Evaluator):
    """Loss, and bits per byte, on each set of held-out text."""

    every: int | None = 500  # steps between evaluations; the end always has one
    tokens: int | None = None  # about how many tokens of each set to evaluate on; None: all

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed`."""
        sets = HeldOut.of(context, self.tokens)
        evaluate = context.sums

        def run(step: int, params: dict) -> tuple[Record, ...]:
            scores = sets.score(evaluate, params)
            return tuple(score.record(name) for name, score in scores.items())

        return run


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out sets, ready to be evaluated on again and again.

    Attributes:
      stores: the sets by name.
      objective: makes examples of their rows.
      layout: how examples are sharded over the mesh.
      length: tokens a row.
      vocab_size: number of tokens of the model.
      batch_size: rows an example; the last one is filled up with rows that weigh nothing.
      tokens: evaluate on about the first so many of each set; None: on all.
      lexicon: of their tokenizer; None where the objective needs none.
      reader: makes rows of a store, as the objective reads them.
    """

    stores: Mapping[str, TokenStore]
    objective: TextObjective
    layout: Layout
    length: int
    vocab_size: int
    batch_size: int
    tokens: int | None = None
    lexicon: TokenTable | None = None
    reader: Callable[[TokenStore, RowFormat], RowReader] = ring

    @classmethod
    def of(cls, context: Context, tokens: int | None = None) -> HeldOut:
        """The held-out sets of a run whose feed is a `TextFeed`; see `tokens`."""
        learner = context.learner
        return cls.of_feed(context.feed, learner.layout, learner.model.vocab_size, tokens)

    @classmethod
    def of_feed(
        cls, feed: TextFeed, layout: Layout, vocab_size: int, tokens: int | None = None
    ) -> HeldOut:
        """The held-out sets of a feed, for a model with so many tokens; see the attributes."""
        return cls(
            stores=feed.prepared.held_out,
            objective=feed.objective,
            layout=layout,
            length=feed.length,
            vocab_size=vocab_size,
            batch_size=feed.batch_size,
            tokens=tokens,
            lexicon=feed.lexicon,
            # Bits per byte count each token once, which rows of whole documents may not.
            reader=ring if feed.objective.predicts_text else feed.prepared.reader,
        )

    def score(self, evaluate: Callable[[dict, Example], Sums], params: dict) -> dict[str, Score]:
        """The scores of these parameters by set.

        Each row is seen once, as the objective prepares it with a seed of the row's own: what is
        hidden of it is the same every time. Where all of the text is predicted but the set is not
        evaluated whole, its bytes are counted in proportion to the tokens.

        Args:
          evaluate: (params, example) -> sums, compiled.
          params: the model's parameters, or an average of them.

        Raises:
          UserError: a set holds nothing to predict, or tokens that the model does not have.
        """
        return {
            name: self._score(name, store, evaluate, params) for name, store in self.stores.items()
        }

    def _score(self, name: str, store: TokenStore, evaluate: Callable, params: dict) -> Score:
        sums = [evaluate(params, example) for example in self.examples(store)]
        # Added up on the host in float64, after all examples have been sent off.
        found = jax.device_get([{"loss": p.loss, "weight": p.weight, **p.extra} for p in sums])
        total = {name: sum(float(part[name]) for part in found) for name in found[0]}
        tokens, nats = total.pop("weight"), total.pop("cross_entropy", total["loss"])
        if not tokens:
            raise UserError(f"the held-out set {name} holds nothing to predict")
        if not self.objective.predicts_text:
            measures = {name: value / tokens for name, value in total.items() if name != "loss"}
            further = {"measures": measures, "counts": self.objective.counts}
            return Score(nats / tokens, None, round(tokens), **further)
        if reason := store.not_comparable():
            return Score(nats / tokens, None, round(tokens), reason)
        text_bytes = store.text_bytes * tokens / store.manifest.tokens
        return Score(nats / tokens, nats / math.log(2) / text_bytes, round(tokens))

    def rows(self, store: TokenStore) -> RowReader:
        """Rows of a set, as the objective reads them."""
        return self.reader(store, self.objective.row_format(self.length))

    def count_rows(self, reader: RowReader) -> int:
        """Number of a set's rows that are evaluated."""
        most = reader.count if self.tokens is None else max(1, self.tokens // self.length)
        return min(reader.count, most)

    def examples(self, store: TokenStore) -> Iterator[Example]:
        """Examples of a set, on the devices; UserError for tokens that the model does not have."""
        objective, length, size = self.objective, self.length, self.batch_size
        prepare = objective.preparation(self.lexicon, length)
        reader = self.rows(store)
        rows, count = EvaluationRows(reader), self.count_rows(reader)
        for first in range(0, count, size):
            tokens, segments = rows.read(first, size)
            tokens[count - first :] = segments[count - first :] = 0
            share = size // jax.process_count()
            mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
            seeds = random_bits(np.arange(first, first + size))
            further = {}
            if objective.reads_spans:
                further["spans"] = rows.spans(first, size).take(np.arange(size)[mine])
            if objective.slots is not None:
                further["labels"] = rows.labels(first, size)[mine]
            example = prepare(tokens[mine], segments[mine], seeds[mine], **further)
            if objective.slots is not None:
                example = shortened(example, self.layout)
            yield to_devices(example, self.layout, self.vocab_size)
