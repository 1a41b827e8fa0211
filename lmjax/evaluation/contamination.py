"""Items of a task that the training data has too, and the score without them.

    found = contamination(questions, store_texts(store, tokenizer))
    for row in clean_scores(right, found): ...

(Brown et al. 2020, arXiv:2005.14165, appendix C: an item is contaminated where a run of 13 words of
it is in the training data.) `Decontaminate` cuts such text out of training data beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lmjax.config import UserError
from lmjax.console import Table
from lmjax.data.cleaning.contamination import text_runs
from lmjax.data.cleaning.near_duplicates import token_pattern
from lmjax.data.store import TokenStore
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.comparison import Interval, mean_interval
from lmjax.evaluation.task_result import TaskResult, row_name
from lmjax.evaluation.tasks.task import Measure

SHORTEST = 8  # words of an item that is searched
CAPTION = (
    "Items of which a run of 13 words is in the training text of the model, and the scores with "
    "and without them. Runs in more than ten documents are common phrases, and do not count."
)
BATCH = 1 << 22  # characters of documents that are searched at a time


class Contamination(NamedTuple):
    """Items of a task beside training data.

    Attributes:
      searched: whether an item has words enough to be searched for.
      overlap: share of its runs of words that are in the training data; NaN where not searched.
    """

    searched: Bool[np.ndarray, "items"]
    overlap: Float[np.ndarray, "items"]

    @property
    def contaminated(self) -> Bool[np.ndarray, "items"]:
        """Items of which a run is in the training data, which are known to be in it."""
        return self.searched & (np.nan_to_num(self.overlap) > 0)


def contamination(
    items: Sequence[str],
    documents: Iterable[str],
    ngram: int = 13,
    shortest: int = SHORTEST,
    most_documents: int | None = 10,
) -> Contamination:
    """Searches training data for the items of a task.

    Words are in lower case and without punctuation; of scripts without spaces each character is
    one. The training data is read once, the items' runs are kept.

    Args:
      items: texts of the items: the question alone, or with its answer.
      documents: of the training data, as `store_texts` gives them.
      ngram: words of a run.
      shortest: words of an item that is shorter than a run and searched whole; fewer are not
        searched.
      most_documents: runs in more documents are common phrases, and no sign; None: all count.

    Raises:
      UserError: no item is long enough.
    """
    if not 1 <= shortest <= ngram:
        raise UserError(f"shortest={shortest}: must be from 1 to ngram={ngram}")
    runs = text_runs(((str(number), text) for number, text in enumerate(items)), ngram, shortest)
    if not runs.names:
        raise UserError(f"contamination: no item has shortest={shortest} words or more")
    table = runs.table()
    seen = np.zeros(len(table.hashes), np.int64)
    for batch in _batches(documents):
        found = table.found([token_pattern(text).findall(text) for text in batch])
        seen += np.bincount(found[:, 1], minlength=len(seen))
    leaks = seen > 0
    if most_documents is not None:
        leaks &= seen <= most_documents
    overlap = np.full(len(items), np.nan)
    for name, own, length in zip(runs.names, runs.hashes, runs.lengths, strict=True):
        first = np.searchsorted(table.lengths, length)
        of_length = table.hashes[first : np.searchsorted(table.lengths, length, "right")]
        overlap[int(name)] = np.mean(leaks[first + np.searchsorted(of_length, own)])
    return Contamination(~np.isnan(overlap), overlap)


def store_texts(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a token store, as their tokens decode."""
    for document in range(store.manifest.documents):
        yield store.text(document, tokenizer)


class CleanScore(NamedTuple):
    """A score over a part of a task's items.

    Attributes:
      part: "all", "contaminated", "clean" (searched and not found), or "not searched".
      items: how many.
      score: their mean; None of fewer items than an interval needs.
    """

    part: str
    items: int
    score: Interval | None


def clean_scores(
    scores: Float[np.ndarray, "items"], found: Contamination
) -> tuple[CleanScore, ...]:
    """Means over all items, and over those with and without text of the training data.

    A score that is higher on contaminated items may also be so because they are easier: common
    texts are both.

    Args:
      scores: of each item.
      found: of the same items.
    """
    parts = {
        "all": np.ones(len(scores), bool),
        "contaminated": found.contaminated,
        "clean": found.searched & ~found.contaminated,
        "not searched": ~found.searched,
    }
    return tuple(
        CleanScore(name, int(part.sum()), mean_interval(scores[part]) if part.sum() > 1 else None)
        for name, part in parts.items()
    )


def contamination_table(
    model: str, results: Sequence[TaskResult], documents: Iterable[str]
) -> Table | None:
    """Scores of a model on items that its training data has, and on those that it lacks.

    Args:
      model: name of it.
      results: of it in some tasks.
      documents: of its training data, which is read once.

    Returns:
      Rows for each task whose score is a mean of its items; None: no item is long enough.
    """
    known = [(one, measure) for one in results if (measure := _mean_measure(one)) is not None]
    items = [f"{q.item.prompt} {q.item.answer}" for one, _ in known for q in one.questions]
    if not any(len(token_pattern(text).findall(text)) >= SHORTEST for text in items):
        return None
    found, rows, first = contamination(items, documents), [], 0
    for result, measure in known:
        part = slice(first, first + len(result.questions))
        first = part.stop
        own = Contamination(found.searched[part], found.overlap[part])
        scores = np.array([one[measure.name] for one in result.scores], float)
        for clean in clean_scores(scores, own):
            numbers = clean.score or (None,) * 3
            rows.append((f"{row_name(result, measure)}, {clean.part}", clean.items, *numbers))
    columns = ("items", "number", "score", "2.5 %", "97.5 %")
    return Table(f"Contamination of {model}", columns, tuple(rows), CAPTION)


def _mean_measure(result: TaskResult) -> Measure | None:
    """The first measure of a task that is the mean of its items."""
    return next((one for one in result.task.measures if one.kind == "mean"), None)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
