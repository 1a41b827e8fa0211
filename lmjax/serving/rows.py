"""Requests as the rows of arrays: the settings of their choice, and how it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from lmjax.serving.active import ActiveRequest
from lmjax.serving.choice import Adjustments, Chosen, RowSettings, choose_rows, score_tokens
from lmjax.serving.request import ScoredToken


@dataclasses.dataclass(frozen=True)
class OpenStep:
    """The next tokens of requests, which the devices may still be choosing.

    Attributes:
      group: the requests.
      lengths: tokens of each before.
      chosen: of the requests, and behind them of rows of padding.
    """

    group: list[ActiveRequest]
    lengths: list[int]
    chosen: Chosen

    @classmethod
    def of(cls, logits: jax.Array, group: Sequence[ActiveRequest], ahead: int = 0) -> OpenStep:
        """Begins to choose.

        Args:
          logits: [rows, vocab] of the requests, and behind them of rows of padding.
          group: the requests.
          ahead: the tokens follow after so many that the requests do not have yet.
        """
        rows = logits.shape[0]
        drawn = any(one.request.sampling.temperature > 0 for one in group)
        settings = row_settings(group, rows, logits.shape[1], ahead) if drawn else None
        ranked = settings is not None and bool(settings.ranked.any())
        tops = any(one.request.tops for one in group)
        chosen = choose_rows(logits, settings, adjustments(group, rows), ranked=ranked, tops=tops)
        return cls(list(group), [len(one.tokens) + ahead for one in group], chosen)

    def tokens(self) -> list[ScoredToken]:
        """The tokens of the requests, once they are chosen."""
        numbers = np.asarray(self.chosen.tokens).tolist()
        scores = np.asarray(self.chosen.log_probabilities).tolist()
        best = [()] * len(self.group)
        if self.chosen.top_tokens is not None:
            pairs = (self.chosen.top_tokens, self.chosen.top_log_probabilities)
            rows = zip(*map(np.asarray, pairs))
            best = [best_of(*row, one.request.tops) for row, one in zip(rows, self.group)]
        return [ScoredToken(*values) for values in zip(numbers, scores, best)]


def choose_next(logits: jax.Array, group: Sequence[ActiveRequest]) -> list[ScoredToken]:
    """The next token of each request; see `OpenStep.of`."""
    return OpenStep.of(logits, group).tokens()


def score_prompt(one: ActiveRequest, logits: jax.Array, chunk: Sequence[int]) -> None:
    """Takes note of the probabilities of the tokens after those of a chunk.

    Args:
      one: whose prompt it is.
      logits: [tokens, vocab] after each token of the chunk, and of padding.
      chunk: its tokens that were read.
    """
    if not one.scored:
        one.scored.append(ScoredToken(one.tokens[0], None))
    following = np.zeros(logits.shape[0], np.int32)
    next_ones = one.tokens[one.cached + 1 : one.cached + len(chunk) + 1]
    following[: len(next_ones)] = next_ones
    found = (np.asarray(a) for a in score_tokens(logits, following))
    for token, score, *best in zip(next_ones, *found):
        tops = best_of(*best, one.request.tops)
        one.scored.append(ScoredToken(token, float(score), tops))


def best_of(
    tokens: np.ndarray, log_probabilities: np.ndarray, count: int
) -> tuple[tuple[int, float], ...]:
    """The first of the most likely tokens of a row, with their log-probabilities."""
    return tuple(zip(tokens[:count].tolist(), log_probabilities[:count].tolist()))


def row_settings(
    active: Sequence[ActiveRequest], rows: int, vocab: int, ahead: int = 0
) -> RowSettings:
    """Settings of the choice for the requests and rows of padding; `ahead` as in `OpenStep.of`."""
    settings = RowSettings(
        temperature=np.zeros(rows, np.float32),
        top_k=np.full(rows, vocab, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        ranked=np.zeros(rows, bool),
        seeds=np.zeros(rows, np.uint32),
        counts=np.zeros(rows, np.int32),
    )
    for row, one in enumerate(active):
        sampling = one.request.sampling
        settings.temperature[row] = sampling.temperature
        for name in ("top_k", "top_p", "min_p"):
            if (value := getattr(sampling, name)) is not None:
                getattr(settings, name)[row] = value
        settings.ranked[row] = sampling.top_k is not None or sampling.top_p is not None
        settings.seeds[row] = sampling.seed
        settings.counts[row] = one.written + ahead
    return settings


def adjustments(active: Sequence[ActiveRequest], rows: int) -> Adjustments | None:
    """Changes of the logits of the requests; None where there are none."""
    changed = [(row, one) for row, one in enumerate(active) if one.request.adjusted]
    if not changed:
        return None
    vocab = changed[0][1].vocab
    found = Adjustments(
        repetition=np.ones(rows, np.float32),
        seen=np.zeros((rows, vocab), bool),
        bias=np.zeros((rows, vocab), np.float32),
    )
    for row, one in changed:
        found.repetition[row] = one.request.sampling.repetition_penalty
        found.seen[row], found.bias[row] = one.seen, one.total_bias()
    return found
