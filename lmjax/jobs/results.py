"""What a finished run came to: its score beside the baselines', and text that it writes."""

from collections.abc import Mapping
from typing import Any

from lmjax.data import PreparedData
from lmjax.evaluation.baselines import ByteBigram, gzip_bits_per_byte
from lmjax.evaluation.recovered_words import (
    commonest_word,
    fill_hidden,
    hide_words,
    masked,
    share_recovered,
    spelt,
)
from lmjax.generation.fill import Filled, Writing
from lmjax.generation.text import TextGenerator

COLUMNS = ("gzip -9", "byte bigram", "model")
WORDS = (
    "What each spends on text that was held out of training: bits per byte of UTF-8, so that "
    "tokenizers do not matter; less is better. Gzip compresses the held-out text by itself. The "
    "bigram model of bytes was counted on the training text of the same domain. Both read the text "
    "as its source has it, of long ones the first 16 MB."
)
RECOVERED_COLUMNS = ("unigram guess", "model")
RECOVERED_WORDS = (
    "The share of words that were found again exactly: one was hidden in each of some hundred "
    "sentences that were held out of training. The guess is always the commonest word of the "
    "training text; the model takes the likeliest token each time. More is better."
)
EXAMPLES = 3  # sentences of each held-out set that are shown


def comparison_words(tokens: int | None) -> str:
    """What the columns are; of each set the model is scored on about the first `tokens`, or all."""
    part = "" if tokens is None else f" The model is scored on the first {tokens:,} tokens or so."
    return WORDS + part


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
    """Why a held-out set has no bits per byte of the model, by set; without those that have."""
    reasons = {name: store.not_comparable() for name, store in prepared.held_out.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def notes(prepared: PreparedData) -> list[str]:
    """What the tokens do not hold of the held-out and the training text, where something is."""
    kinds = (("held-out", prepared.held_out), ("training", prepared.train))
    found = [
        (name, kind, store.manifest.round_trip.note())
        for kind, stores in kinds
        for name, store in stores.items()
    ]
    return [f"{name}, {kind} text: {note}." for name, kind, note in found if note]


def recover(
    generator: TextGenerator, prepared: PreparedData
) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
    """How many hidden words are found again.

    Sets without sentences are left out; for a model that does not write into blanks all are.

    Returns:
      By held-out set, the shares of a unigram guess and of the model; and the first sentences of
      each set as samples, with the word that was hidden.
    """
    rows, samples = {}, []
    if not isinstance(generator.filling, Writing):
        return rows, samples
    for name, store in prepared.held_out.items():
        hidden = hide_words(map(bytes.decode, store.source_texts()))
        if hidden:
            training = prepared.train.get(name) or next(iter(prepared.train.values()))
            guess = commonest_word(map(bytes.decode, training.source_texts()))
            words = [spelt(generator.tokenizer, sentence.word) for sentence in hidden]
            guesses = [Filled(guess, [spelt(generator.tokenizer, guess)])] * len(hidden)
            filled = fill_hidden(generator, hidden)
            values = (share_recovered(guesses, words), share_recovered(filled, words))
            rows[name] = dict(zip(RECOVERED_COLUMNS, values, strict=True))
            samples += [
                {
                    "prompt": masked(generator, sentence),
                    # Unlike the other samples it is not drawn.
                    "text": f"\n{text.text}\n(held out; hidden was: {sentence.word}; "
                    "filled in: the likeliest tokens)",
                }
                for sentence, text in zip(hidden[:EXAMPLES], filled, strict=False)
                if text is not None
            ]
    return rows, samples
