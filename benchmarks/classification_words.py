"""Logistic regression on the words of texts, in an interpreter that has scikit-learn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import serve

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)  # inverse of the regularisation
LONGEST = (1, 2)  # words of a feature: single ones, or pairs of neighbours too
PARTS = 3  # of the training texts, for the choice among them
WORD = r"(?u)\w+|[^\w\s]"


def classify(train: Sequence[str], test: str) -> dict[str, Any]:
    """Predicted classes of test texts, and the settings that cross-validation chose.

    Args:
      train: files of JSON lines with "text" and "label".
      test: file likewise.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import Pipeline

    records = [record for path in train for record in records_of(path)]
    asked = [record["text"] for record in records_of(test)]
    words = TfidfVectorizer(token_pattern=WORD, sublinear_tf=True)
    steps = [("words", words), ("model", LogisticRegression(max_iter=1000))]
    grid = {
        "words__ngram_range": [(1, longest) for longest in LONGEST],
        "model__C": STRENGTHS,
    }
    parts = StratifiedKFold(PARTS, shuffle=True, random_state=0)
    search = GridSearchCV(Pipeline(steps), grid, cv=parts)
    search.fit([one["text"] for one in records], [one["label"] for one in records])
    chosen = search.best_params_
    return {
        "predicted": search.predict(asked).tolist(),
        "strength": chosen["model__C"],
        "longest": chosen["words__ngram_range"][1],
    }


def records_of(path: str) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


if __name__ == "__main__":
    serve({"classify": classify})
