"""Held-out text: bits per byte of the model beside those of gzip and of a bigram model of bytes."""

from __future__ import annotations

from collections.abc import Mapping

from lmjax.config import config
from lmjax.console import Table
from lmjax.data import PreparedData
from lmjax.evaluation.baselines import ByteBigram, gzip_bits_per_byte
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator, Record
from lmjax.evaluation.held_out import HELD_OUT
from lmjax.launch import is_first

SETS = "held-out text"
COLUMNS = ("gzip -9", "byte bigram", "model")
CAPTION = (
    "Bits per byte of UTF-8 on text that was held out of training, so that tokenizers do not "
    "matter; less is better. Gzip compresses the held-out text by itself. The bigram model of "
    "bytes was counted on the training text of the same domain. Both read the text as its source "
    "has it, of long ones the first 16 MB."
)
LOSS_CAPTION = (
    "Nats per predicted token of documents that were held out of training. It compares models with "
    "this objective and this tokenizer alone; less is better."
)


@config
class TextBaselines(Evaluator):
    """Table of the last held-out scores, beside simple models of the text where that is fair."""

    tokens: int | None = None  # of each set that the model was scored on, as in HeldOutLoss

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed`."""
        prepared = context.feed.prepared
        part = ""
        if self.tokens is not None:
            part = f" The model is scored on the first {self.tokens:,} tokens or so."

        def evaluate(step: int, params: dict) -> tuple[Table, ...]:
            if not is_first():
                return ()
            notes = tuple(text_notes(prepared))
            if not context.feed.objective.predicts_text:
                losses = last_scores(context.records(), step, "loss")
                rows = tuple(losses.items())
                names = (SETS, "nats per token")
                return (Table("Held-out loss", names, rows, LOSS_CAPTION + part, False, notes),)
            scores = compare(prepared, last_scores(context.records(), step, "bits_per_byte"))
            rows = tuple((name, *map(row.get, COLUMNS)) for name, row in scores.items())
            names = (SETS, *COLUMNS)
            return (Table("Bits per byte", names, rows, CAPTION + part, False, notes),)

        return evaluate


def last_scores(records: list[Record], step: int, measure: str) -> dict[str, float]:
    """Values of a measure after a step, by held-out set."""
    return {
        record["split"].removeprefix(HELD_OUT): float(record[measure])
        for record in records
        if record["step"] == step and record["split"].startswith(HELD_OUT) and measure in record
    }


def compare(prepared: PreparedData, scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Bits per byte by held-out set: of gzip, of a byte bigram model, and of the model.

    Gzip and the bigram model read what the stores keep of the source's text. A set that has no text
    or no score lacks what would be measured by it.

    Args:
      prepared: the data, with the text of all its sets.
      scores: bits per byte of the model, by set.
    """
    rows = {}
    for name, store in prepared.held_out.items():
        # Its own kind of text where the training holds some, otherwise all there is.
        training = prepared.train if name not in prepared.train else {name: prepared.train[name]}
        bigram = ByteBigram()
        for source in training.values():
            bigram.fit(source.source_texts())
        texts, values = list(store.source_texts()), (None, None)
        if any(texts):
            values = gzip_bits_per_byte(texts), bigram.bits_per_byte(texts)
        row = dict(zip(COLUMNS, (*values, scores.get(name)), strict=True))
        rows[name] = {column: value for column, value in row.items() if value is not None}
    return rows


def withheld(prepared: PreparedData) -> dict[str, str]:
    """Reasons why held-out sets have no bits per byte of the model, by set."""
    reasons = {name: store.not_comparable() for name, store in prepared.held_out.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def text_notes(prepared: PreparedData) -> list[str]:
    """Notes on what the tokens lose of the held-out and the training text."""
    kinds = (("held-out", prepared.held_out), ("training", prepared.train))
    found = [
        (name, kind, store.manifest.round_trip.note())
        for kind, stores in kinds
        for name, store in stores.items()
    ]
    return [f"{name}, {kind} text: {note}." for name, kind, note in found if note]
