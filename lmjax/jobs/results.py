"""What a finished run came to: its score beside the baselines', and text that it writes."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from lmjax.data import PreparedData, TokenStore
from lmjax.evaluation.baselines import ByteBigram, gzip_bits_per_byte
from lmjax.evaluation.recovered_words import (
    commonest_word,
    fill_hidden,
    hide_words,
    masked,
    share_recovered,
)
from lmjax.generation.fill import Writing
from lmjax.generation.text import TextGenerator

COLUMNS = ("gzip -9", "byte bigram", "model")
WORDS = (
    "What each spends on text that was held out of training: bits per byte of UTF-8, so that "
    "tokenizers do not matter; less is better. Gzip compresses the held-out text by itself. The "
    "bigram model of bytes was counted on the training text of the same domain."
)
RECOVERED_COLUMNS = ("unigram guess", "model")
RECOVERED_WORDS = (
    "The share of words that were found again exactly: one was hidden in each of some hundred "
    "sentences that were held out of training. The guess is always the commonest word of the "
    "training text; the model takes the likeliest token each time. More is better."
)
BIGRAM_BYTES = 16_000_000  # of training text: a bigram model has no more to learn from more
GZIP_BYTES = 16_000_000  # of held-out text
EXAMPLES = 3  # sentences of each held-out set that are shown


def compare(prepared: PreparedData, scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Bits per byte by held-out set: of gzip, of a byte bigram model, and of the model.

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
            bigram.fit(_texts(prepared, source, BIGRAM_BYTES))
        texts = list(_texts(prepared, store, GZIP_BYTES))
        values = (gzip_bits_per_byte(texts), bigram.bits_per_byte(texts), scores[name])
        rows[name] = dict(zip(COLUMNS, values, strict=True))
    return rows


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
        hidden = hide_words(map(bytes.decode, _texts(prepared, store, GZIP_BYTES)))
        if hidden:
            training = prepared.train.get(name) or next(iter(prepared.train.values()))
            guess = commonest_word(map(bytes.decode, _texts(prepared, training, BIGRAM_BYTES)))
            right = sum(sentence.word == guess for sentence in hidden)
            filled = fill_hidden(generator, hidden)
            values = (right / len(hidden), share_recovered(filled, hidden))
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


def _texts(prepared: PreparedData, store: TokenStore, size: int) -> Iterator[bytes]:
    """Documents of a store as UTF-8, until about `size` bytes."""
    lengths = itertools.accumulate(store.document_bytes)
    enough = 1 + sum(1 for _ in itertools.takewhile(lambda length: length < size, lengths))
    for text in itertools.islice(prepared.texts(store), enough):
        yield text.encode("utf-8")
