"""The text that a run was trained on, as documents."""

from __future__ import annotations

from collections.abc import Iterator

from lmjax.config import UserError
from lmjax.data import Data, prepare
from lmjax.evaluation.contamination import store_texts
from lmjax.runs.folder import RunFolder


def training_data(folder: str) -> Data:
    """Settings of the data of a run. UserError: the folder is none, or of a run without data."""
    data = getattr(RunFolder(folder).experiment(), "data", None)
    if not isinstance(data, Data):
        raise UserError(f"{folder}: the run has no data, so its training text cannot be searched")
    return data


def training_texts(folder: str) -> Iterator[str]:
    """Documents that a run was trained on, decoded from their tokens, one store after another.

    Raises:
      UserError: see `training_data`, or the data cannot be read any more.
    """
    prepared = prepare(training_data(folder), RunFolder(folder).tokenizer)
    for store in prepared.train.values():
        yield from store_texts(store, prepared.tokenizer)
