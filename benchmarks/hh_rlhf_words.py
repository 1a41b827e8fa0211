"""Logistic regression on words of compared answers, in an interpreter that has scikit-learn."""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import serve

STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
PARTS = 5  # of the training pairs, for the choice among them
WORD = r"(?u)\w+|[^\w\s]"
FEWEST = 3  # texts that have a word which counts


def fit(path: str) -> dict[str, Any]:
    """Leads of the better texts of held-out pairs, and the strength that cross-validation chose.

    The features are the words that the one text has and the other lacks; what both begin with
    counts for nothing, and neither does the order of the two.

    Args:
      path: JSON file with "train" and "held_out", each with the texts "better" and "worse".
    """
    import numpy as np
    import scipy.sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = json.loads(Path(path).read_text("utf-8"))
    words = CountVectorizer(min_df=FEWEST, token_pattern=WORD, binary=True)
    words.fit([text for side in ("better", "worse") for text in texts["train"][side]])
    train, held_out = (
        words.transform(texts[split]["better"]).astype(float)
        - words.transform(texts[split]["worse"]).astype(float)
        for split in ("train", "held_out")
    )

    def fitted(rows: Any, strength: float) -> np.ndarray:
        both = scipy.sparse.vstack([rows, -rows])
        labels = np.repeat([1, 0], rows.shape[0])
        model = LogisticRegression(C=strength, fit_intercept=False, max_iter=2000)
        return model.fit(both, labels).coef_[0]

    part = np.random.default_rng(0).integers(PARTS, size=train.shape[0])
    scores = {
        strength: np.mean(
            np.concatenate(
                [train[part == n] @ fitted(train[part != n], strength) > 0 for n in range(PARTS)]
            )
        )
        for strength in STRENGTHS
    }
    best = max(scores, key=scores.get)
    return {"strength": best, "leads": (held_out @ fitted(train, best)).tolist()}


if __name__ == "__main__":
    serve({"fit": fit})
