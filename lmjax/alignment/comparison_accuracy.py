"""Accuracy on held-out comparisons, beside that of a rule that looks at lengths alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int64

from lmjax.config import UserError, config
from lmjax.console import Table
from lmjax.data.store import TokenStore
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator
from lmjax.evaluation.text_baselines import last_scores
from lmjax.launch import is_first

COLUMNS = ("held-out comparisons", "by length", "model", "standard error")
CAPTION = (
    "Share of held-out comparisons in which the better answer has the higher score. By length: the "
    "better of taking always the longer answer, and always the shorter one."
)


@config
class ComparisonAccuracy(Evaluator):
    """Table of the last accuracies on held-out comparisons."""

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed` of comparisons."""
        stores = context.feed.prepared.held_out
        by_length = {name: length_accuracy(store) for name, store in stores.items()}

        def evaluate(step: int, params: dict) -> tuple[Table, ...]:
            if not is_first():
                return ()
            found = last_scores(context.records(), step, "accuracy")
            counts = last_scores(context.records(), step, "comparisons")
            rows = []
            for name, accuracy in found.items():
                count = int(counts[name])
                error = math.sqrt(accuracy * (1 - accuracy) / count)
                rows.append((f"{name}, {count:,}", by_length[name], accuracy, error))
            return (Table("Comparisons", COLUMNS, tuple(rows), CAPTION),)

        return evaluate


def length_accuracy(store: TokenStore) -> float:
    """Accuracy of the rule "longer", or of "shorter" where that is better, on the store's pairs.

    The first label of a document is its number in its comparison, the second its rank. Answers of
    one length are decided by half.
    """
    sizes, longer, pairs = np.diff(store.offsets), 0.0, 0
    for better, worse in pairs_of(store):
        lead = sizes[better] - sizes[worse]
        longer += float(np.sum(lead > 0) + 0.5 * np.sum(lead == 0))
        pairs += len(lead)
    share = longer / max(pairs, 1)
    return max(share, 1 - share)


def pairs_of(
    store: TokenStore, slots: int | None = None
) -> Iterator[tuple[Int64[np.ndarray, "pairs"], Int64[np.ndarray, "pairs"]]]:
    """Pairs of answers of one comparison with different ranks: the better one, the worse one.

    Args:
      store: of comparisons, in each of which the best answer comes first.
      slots: answers of a comparison that are read; None: all.
    """
    number, rank = store.labels[:, 0], store.labels[:, 1]
    group = np.cumsum(number == 0)
    read = number < (slots or np.inf)
    for apart in range(1, int(number.max(initial=0)) + 1):
        same = (group[apart:] == group[:-apart]) & (rank[apart:] != rank[:-apart]) & read[apart:]
        better = np.flatnonzero(same)
        yield better, better + apart


def require_pairs(stores: Mapping[str, TokenStore], slots: int) -> None:
    """Raises UserError for comparisons of which none says that an answer is better than another.

    Args:
      stores: by what users know them as.
      slots: answers of a comparison that are read.
    """
    for name, store in stores.items():
        # What is in no groups is refused where its rows are made.
        if store.labels.shape[1] and not any(len(better) for better, _ in pairs_of(store, slots)):
            raise UserError(
                f"{name}: none of its comparisons says that an answer is better than another "
                f"(each has one answer, or ties, among its first {slots})"
            )
