"""Perplexities of texts by words, bytes and characters, kept as logarithms."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lmjax.config import UserError
from lmjax.data.cleaning.units import split_words

BLANKS = re.compile(r"\s+")
LARGEST = math.log(1e300)  # of a logarithm whose number is shown


class TextPerplexity(NamedTuple):
    """Perplexity of texts, by the units that are counted in them.

    Of one sum of log-likelihoods; figures of two models with different tokenizers can be compared,
    as the units are of the texts and not of tokens.

    Attributes:
      nats: minus the log-likelihood of all texts.
      words: between blanks, as lm-evaluation-harness counts them; None for texts of scripts without
        spaces, where it takes a text for one word, and overflows.
      characters: of Unicode.
      bytes: of UTF-8.
    """

    nats: float
    words: int | None
    characters: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte (Gao et al. 2020, arXiv:2101.00027, section 3.1)."""
        return self.nats / self.bytes / math.log(2)

    @property
    def bits_per_character(self) -> float:
        """Bits for each character."""
        return self.nats / self.characters / math.log(2)

    @property
    def log_word_perplexity(self) -> float:
        """Natural logarithm of the perplexity by words, which cannot overflow.

        Raises:
          UserError: the words of the texts cannot be counted.
        """
        if self.words is None:
            raise UserError(
                "word perplexity: texts of a script without spaces have no words that can be"
                " counted: take bits per character"
            )
        return self.nats / self.words

    @property
    def word_perplexity(self) -> float:
        """Perplexity by words; inf where it is beyond 1e300, its logarithm stays."""
        log = self.log_word_perplexity
        return math.exp(log) if log < LARGEST else math.inf


def text_perplexity(log_likelihoods: Sequence[float], texts: Sequence[str]) -> TextPerplexity:
    """Perplexity of texts together: their sums, not a mean of perplexities.

    Args:
      log_likelihoods: of each whole text, in nats.
      texts: the texts, before any change for the model.

    Raises:
      UserError: there is no text but empty ones, or a log-likelihood is not finite or above 0.
    """
    for number, value in enumerate(log_likelihoods):
        if not (math.isfinite(value) and value <= 0):
            raise UserError(f"perplexity: the log-likelihood of text {number} is {value}")
    nats = -math.fsum(value for value, _ in zip(log_likelihoods, texts, strict=True))
    characters = sum(map(len, texts))
    if not characters:
        raise UserError("perplexity: there is no text")
    words = None
    if not any(split_words(text).spaceless for text in texts):
        words = sum(len(BLANKS.split(text)) for text in texts)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return TextPerplexity(nats, words, characters, size)
