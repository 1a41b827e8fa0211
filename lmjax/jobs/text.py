"""Text for training, prepared and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.config import UserError
from lmjax.console import RunLog, Stopwatch
from lmjax.data import Data, JsonPrompts, PreparedData, prepare
from lmjax.data.round_trip import LITTLE, percent
from lmjax.data.rows import RowReader
from lmjax.evaluation.text_baselines import withheld
from lmjax.objectives import TextObjective
from lmjax.runs.trained_model import beyond_table
from lmjax.training.feed import RequestFeed, TextFeed


def prepare_text(
    data: Data,
    tokenizer_folder: Path,
    vocab_size: int,
    log: RunLog,
    saved: dict[str, Any],
) -> PreparedData:
    """Tokenizer and token stores, made or found, with what is lost of the text logged.

    Args:
      data: the text.
      tokenizer_folder: where the run keeps its tokenizer.
      vocab_size: number of tokens of the model.
      log: for facts and warnings.
      saved: what the newest checkpoint holds beside its arrays.

    Raises:
      UserError: the text cannot be read, is not the checkpoint's, or has tokens that the model
        lacks.
    """
    watch = Stopwatch()
    before = saved.get("text")
    if saved and before is None:
        log.warn(
            f"the checkpoint of step {saved['step']:,} does not say what text it was trained "
            "on, so whether it is the same is not known"
        )
    with log.phase("reading the text") as report:
        prepared = prepare(data, tokenizer_folder, report, before)
    for words in prepared.warnings:
        log.warn(words)
    check_vocabulary(prepared, vocab_size, log.warn)
    for name, store in (prepared.train | prepared.held_out).items():
        if store.manifest.skipped:
            log.warn(
                f"{name}: {store.manifest.skipped:,} pieces of input were left out, the first "
                f"of them: {store.manifest.skipped_first[0]}"
            )
    sizes = (
        f"{name} {store.manifest.tokens / 1e6:,.2f} M tokens"
        for name, store in prepared.train.items()
    )
    log.fact("text", ", ".join(sizes), watch.seconds())
    return prepared


def check_vocabulary(prepared: PreparedData, vocab_size: int, warn: Callable[[str], None]) -> None:
    """Compares the tokens of all stores with those of the model.

    A tokenizer may have more, as public ones do whose padding token was added later, as long as
    none of these occurs.

    Raises:
      UserError: one of them is in the text.
    """
    words = beyond_table(prepared.tokenizer, vocab_size)
    if words is None:
        return
    for name, store in (prepared.train | prepared.held_out).items():
        if (largest := store.manifest.largest) >= vocab_size:
            raise UserError(
                f"{words}; the text of {name} has the token {largest}: set "
                f"model.vocab_size={prepared.tokenizer.vocab_size}"
            )
    warn(f"{words}; the text has none of them")


def check_special_tokens(feed: TextFeed) -> None:
    """Raises UserError for a tokenizer without a special token that the objective needs."""
    padding = np.zeros((1, feed.objective.row_length(feed.length)), np.int32)
    feed.preparation(padding, padding, np.zeros(1, np.uint64))


def print_rows(log: RunLog, feed: TextFeed) -> None:
    """Logs how much of the rows is padding, and which documents have no room in one."""
    for name, reader in feed.loader.mixture.readers.items():
        if words := reader.note():
            log.fact("rows", f"{name}: {words}")
    warn_of_rows(log, feed.loader.mixture.readers)


def warn_of_requests(log: RunLog, feed: RequestFeed) -> None:
    """Logs which requests, held-out ones too, have no room in `data.length` tokens."""
    warn_of_rows(log, feed.mixture.readers)
    warn_of_rows(log, feed.held_out_rows, "held_out/")


def warn_of_rows(log: RunLog, readers: Mapping[str, RowReader], before: str = "") -> None:
    """Logs which documents of some sets have no room in a row.

    Args:
      log: for the warnings.
      readers: of the sets, by name.
      before: what their names begin with in the log.
    """
    for name, reader in readers.items():
        if words := reader.warning():
            log.warn(f"{before}{name}: {words}")


def warn_of_answers(log: RunLog, data: Data, objective: TextObjective) -> None:
    """Logs which objectives take the tokens around answers for text.

    It may be meant, as in a mixture of objectives, so it is no error.
    """
    unaware = dict.fromkeys(objective.unaware_of_answers())
    for domain in data.train if unaware else ():
        for source in (domain.source, domain.evaluation):
            if isinstance(source, JsonPrompts):
                log.warn(
                    f"{domain.name}: {' and '.join(unaware)} take{'s' * (len(unaware) == 1)} the "
                    f"tokens around answers, {source.mask} and {source.closing}, for text. Answers "
                    f"alone are learnt with objective=BlankInfilling, answers={source.mask!r}, eop="
                    f"{source.closing!r}; with JsonLines as source, texts without such tokens"
                )


def warn_of_losses(log: RunLog, prepared: PreparedData, predicts_text: bool) -> None:
    """Logs which texts the tokens do not hold, and what that means for the run.

    Args:
      log: for the warnings.
      prepared: the data of the run.
      predicts_text: whether bits per byte are to be measured.
    """
    for name, store in (prepared.held_out | prepared.train).items():
        trip = store.manifest.round_trip
        if trip.unknown_share > LITTLE:
            log.warn(
                f"{name}: {percent(trip.unknown_share)} of the tokens are unknown "
                f"({trip.unknown_name}), and nothing is learnt of what they stand for. Take a "
                "tokenizer that was made for such text, with the settings that it was made with; "
                "data.tokenizer=TrainedBPE() makes one from the text"
            )
    for name, reason in withheld(prepared).items() if predicts_text else ():
        log.warn(f"{name}: bits per byte are withheld, as they are {reason}")
