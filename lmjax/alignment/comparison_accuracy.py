"""Accuracy on held-out comparisons, beside that of a rule that looks at lengths alone."""

from __future__ import annotations

import math

import numpy as np

from lmjax.config import config
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
            counts = last_scores(context.records(), step, "tokens")
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
    number, rank = store.labels[:, 0], store.labels[:, 1]
    group, sizes = np.cumsum(number == 0), np.diff(store.offsets)
    longer, pairs = 0.0, 0
    for apart in range(1, int(number.max(initial=0)) + 1):
        same = (group[apart:] == group[:-apart]) & (rank[apart:] != rank[:-apart])
        # The one that comes first is the better one.
        lead = (sizes[:-apart] - sizes[apart:])[same]
        longer += float(np.sum(lead > 0) + 0.5 * np.sum(lead == 0))
        pairs += len(lead)
    share = longer / max(pairs, 1)
    return max(share, 1 - share)
