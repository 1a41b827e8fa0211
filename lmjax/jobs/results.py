"""What a finished run came to: its score beside the baselines', and text that it writes."""

import itertools
from collections.abc import Iterator, Mapping

from lmjax.data import PreparedData, TokenStore
from lmjax.evaluation.baselines import ByteBigram, gzip_bits_per_byte

COLUMNS = ("gzip -9", "byte bigram", "model")
WORDS = (
    "What each spends on text that was held out of training: bits per byte of UTF-8, so that "
    "tokenizers do not matter; less is better. Gzip compresses the held-out text by itself. The "
    "bigram model of bytes was counted on the training text of the same domain."
)
BIGRAM_BYTES = 16_000_000  # of training text: a bigram model has no more to learn from more
GZIP_BYTES = 16_000_000  # of held-out text


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


def _texts(prepared: PreparedData, store: TokenStore, size: int) -> Iterator[bytes]:
    """Documents of a store as UTF-8, until about `size` bytes."""
    lengths = itertools.accumulate(store.document_bytes)
    enough = 1 + sum(1 for _ in itertools.takewhile(lambda length: length < size, lengths))
    for text in itertools.islice(prepared.texts(store), enough):
        yield text.encode("utf-8")
