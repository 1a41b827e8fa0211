"""Report of a reward model: accuracy by margin, calibration, and how much of it length explains."""

from __future__ import annotations

import math

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lmjax.alignment.document_values import everywhere, values_of_documents
from lmjax.alignment.pair_measures import (
    ScoredPairs,
    by_margin,
    calibration,
    calibration_error,
    variance_by_length,
    won,
)
from lmjax.config import config
from lmjax.console import Cell, Table
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator
from lmjax.evaluation.held_out import HeldOut
from lmjax.launch import is_first
from lmjax.objectives import Example

MARGIN_COLUMNS = ("held-out pairs", "standard error", "accuracy")
MARGIN_CAPTION = (
    "Share of pairs in which the better answer has the higher score, by the margin that the data "
    "give, or else by how many ranks it is better."
)
CALIBRATION_COLUMNS = ("held-out pairs", "share of pairs", "predicted", "agreement", "error")
CALIBRATION_CAPTION = (
    "Pairs by the probability that the answer with the higher score is the better one, as the lead "
    "of its score says: its mean, and the share of pairs in which that answer is. The error of all "
    "is the expected calibration error."
)
LENGTH_COLUMNS = (
    "held-out pairs",
    "better is longer",
    "higher score is longer",
    "accuracy, better is longer",
    "accuracy, better is shorter",
    "variance by length",
)
LENGTH_CAPTION = (
    "What length explains of the scores. How often the better answer, and that with the higher "
    "score, is the longer one (the area under the curve of a model that looks at lengths alone); "
    "the accuracy where the better one is longer and where it is shorter; and the share of the "
    "variance of a pair's difference of scores that its difference of lengths explains."
)


@config
class RewardReport(Evaluator):
    """Tables of a reward model's scores on held-out comparisons."""

    tokens: int | None = None  # of each set, as in HeldOutLoss

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed` with the objective RewardRanking."""
        sets, objective = HeldOut.of(context, self.tokens), context.feed.objective
        graph = context.learner.graph

        @jax.jit
        def compute(params: dict, example: Example) -> Float[Array, "rows slots"]:
            return everywhere(objective.scores(nnx.merge(graph, params), example.inputs))

        def evaluate(step: int, params: dict) -> tuple[Table, ...]:
            found = {}
            for name, store in sets.stores.items():
                scores = values_of_documents(sets, store, lambda one: compute(params, one))
                found[name] = ScoredPairs.of(store, scores)
            return tables_of(found) if is_first() else ()

        return evaluate


def tables_of(found: dict[str, ScoredPairs]) -> tuple[Table, ...]:
    """Tables of the scores of each held-out set; that by margin where margins differ."""
    margins = [row for name, pairs in found.items() for row in _margin_rows(name, pairs)]
    tables = [Table("Accuracy by margin", MARGIN_COLUMNS, tuple(margins), MARGIN_CAPTION)]
    calibrated = [row for name, pairs in found.items() for row in _calibration_rows(name, pairs)]
    lengths = tuple(_length_row(name, pairs) for name, pairs in found.items())
    return (
        *(tables if margins else ()),
        Table(
            "Calibration",
            CALIBRATION_COLUMNS,
            tuple(calibrated),
            CALIBRATION_CAPTION,
            picture="calibration",
        ),
        Table("Length", LENGTH_COLUMNS, lengths, LENGTH_CAPTION),
    )


def _margin_rows(name: str, pairs: ScoredPairs) -> list[tuple[Cell, ...]]:
    parts = by_margin(pairs)
    rows = []
    for margin, part in parts if len(parts) > 1 else ():
        error = math.sqrt(part.accuracy * (1 - part.accuracy) / len(part))
        rows.append((f"{name}, {margin:.3g}, {len(part):,}", error, part.accuracy))
    return rows


def _calibration_rows(name: str, pairs: ScoredPairs) -> list[tuple[Cell, ...]]:
    bins = calibration(pairs)
    rows = []
    for one in bins:
        error = abs(one.predicted - one.agreement)
        title = f"{name}, {one.low:.1f} to {one.high:.1f}"
        rows.append((title, one.share, one.predicted, one.agreement, error))
    predicted = float(np.mean(1 / (1 + np.exp(-np.abs(pairs.lead))))) if len(pairs) else None
    rows.append((f"{name}, all", 1.0, predicted, pairs.accuracy, calibration_error(bins)))
    return rows


def _length_row(name: str, pairs: ScoredPairs) -> tuple[Cell, ...]:
    differs = pairs.where(pairs.lead != 0)
    cells = (
        won(pairs.longer),
        won(np.sign(differs.lead) * differs.longer),
        pairs.where(pairs.longer > 0).accuracy,
        pairs.where(pairs.longer < 0).accuracy,
        variance_by_length(pairs),
    )
    # A table has no cell where there is no pair of a kind.
    return (f"{name}, {len(pairs):,}", *(None if math.isnan(cell) else cell for cell in cells))
