"""Loss and bits per byte on held-out token stores, on whatever mesh the model lies on."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from lmjax.config import UserError
from lmjax.data.mixture import EvaluationRows
from lmjax.data.permutation import random_bits
from lmjax.data.store import TokenStore
from lmjax.models import Batch
from lmjax.objectives import Lexicon, Objective, Sums
from lmjax.parallel import Layout
from lmjax.training.placement import to_devices


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model comes to on one set.

    Attributes:
      loss: nats per predicted token, without regularisers.
      bits_per_byte: bits for the text, its ends of documents included, per byte of UTF-8; None
        where the objective does not predict all of the text, or the tokens do not hold it.
      tokens: number of tokens that were predicted.
      withheld: why there are no bits per byte, where the tokens are the reason; otherwise empty.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    withheld: str = ""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out sets, ready to be evaluated on again and again.

    Attributes:
      stores: the sets by name.
      objective: makes batches of their rows.
      layout: says how batches lie on the mesh.
      length: tokens a row.
      vocab_size: number of tokens that the model has.
      batch_size: rows a batch; the last one is filled up with rows that weigh nothing.
      tokens: evaluate on about the first so many of each set; None: on all.
      lexicon: of their tokenizer; None where the objective asks for nothing.
    """

    stores: Mapping[str, TokenStore]
    objective: Objective
    layout: Layout
    length: int
    vocab_size: int
    batch_size: int
    tokens: int | None = None
    lexicon: Lexicon | None = None

    def score(self, step: Callable[[dict, Batch], Sums], params: dict) -> dict[str, Score]:
        """The scores of these parameters by set.

        Each row is seen once, as the objective prepares it with a seed of the row's own: what is
        hidden of it is the same every time. Where all of the text is predicted but the set is not
        evaluated whole, its bytes are counted in proportion to the tokens.

        Args:
          step: (params, batch) -> sums, compiled.
          params: the model's parameters, or an average of them.

        Raises:
          UserError: a set holds nothing to predict, or tokens that the model does not have.
        """
        return {name: self._score(name, store, step, params) for name, store in self.stores.items()}

    def _score(self, name: str, store: TokenStore, step: Callable, params: dict) -> Score:
        sums = [step(params, batch) for batch in self._batches(store)]
        # Added up on the host in float64, after all batches have been sent off.
        pairs = jax.device_get(
            [(part.weight, part.extra.get("cross_entropy", part.loss)) for part in sums]
        )
        tokens, nats = (sum(map(float, column)) for column in zip(*pairs, strict=True))
        if not tokens:
            raise UserError(f"the held-out set {name} holds nothing to predict")
        if not self.objective.predicts_text:
            return Score(nats / tokens, None, round(tokens))
        if reason := store.not_comparable():
            return Score(nats / tokens, None, round(tokens), reason)
        text_bytes = store.text_bytes * tokens / store.manifest.tokens
        return Score(nats / tokens, nats / math.log(2) / text_bytes, round(tokens))

    def _batches(self, store: TokenStore) -> Iterator[Batch]:
        objective, length = self.objective, self.length
        prepare = objective.preparation(self.lexicon, length)
        rows = EvaluationRows(store, objective.row_length(length), objective.row_overlap(length))
        count = len(rows)
        if self.tokens is not None:
            count = min(count, max(1, self.tokens // self.length))
        for first in range(0, count, self.batch_size):
            tokens, segments = rows.read(first, self.batch_size)
            tokens[count - first :] = segments[count - first :] = 0
            share = self.batch_size // jax.process_count()
            mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
            seeds = random_bits(np.arange(first, first + self.batch_size))
            batch = prepare(tokens[mine], segments[mine], seeds[mine])
            yield to_devices(batch, self.layout, self.vocab_size)
