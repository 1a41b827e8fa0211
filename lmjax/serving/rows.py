"""Requests as the rows of arrays: the settings of their choice, and how it is made."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from lmjax.serving.active import ActiveRequest
from lmjax.serving.choice import Adjustments, RowSettings, choose_rows
from lmjax.serving.request import ScoredToken


def choose_next(logits: jax.Array, active: Sequence[ActiveRequest]) -> list[ScoredToken]:
    """The next token of each request.

    Args:
      logits: [rows, vocab] of the requests, and behind them of rows of padding.
      active: the requests.
    """
    rows = logits.shape[0]
    drawn = any(one.request.sampling.temperature > 0 for one in active)
    settings = row_settings(active, rows, logits.shape[1]) if drawn else None
    ranked = settings is not None and bool(settings.ranked.any())
    tops = any(one.request.tops for one in active)
    found = choose_rows(logits, settings, adjustments(active, rows), ranked=ranked, tops=tops)
    tokens, scores = np.asarray(found.tokens).tolist(), np.asarray(found.log_probabilities).tolist()
    best = [()] * len(active)
    if tops:
        pairs = np.asarray(found.top_tokens), np.asarray(found.top_log_probabilities)
        best = [best_of(*row, one.request.tops) for *row, one in zip(*pairs, active)]
    return [ScoredToken(*values) for values in zip(tokens, scores, best)]


def best_of(
    tokens: np.ndarray, log_probabilities: np.ndarray, count: int
) -> tuple[tuple[int, float], ...]:
    """The first of the most likely tokens of a row, with their log-probabilities."""
    return tuple(zip(tokens[:count].tolist(), log_probabilities[:count].tolist()))


def row_settings(active: Sequence[ActiveRequest], rows: int, vocab: int) -> RowSettings:
    """Settings of the choice for the requests and rows of padding."""
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
        settings.counts[row] = one.written
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
