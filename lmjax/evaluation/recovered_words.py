"""Words hidden in held-out sentences: the share that a model which fills blanks finds again."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.config import UserError
from lmjax.data.permutation import random_bits
from lmjax.data.tokenizers import Tokenizer
from lmjax.generation import Sampling, TextGenerator
from lmjax.generation.fill import Filled

SENTENCES = 400  # of each set
WORDS = 5, 30  # fewest and most of a sentence
ROWS = 50  # sentences at a time
LONGEST = 12  # tokens that the model may take for a word
# Where sentences part: behind . ? ! and at empty lines.
PARTING = re.compile(r"(?<=[.?!])\s+|\n\s*\n")
# Letters behind a space that are all of a word.
WORD = re.compile(r"(?<= )[^\W\d_]+(?![\w-])")


class Hidden(NamedTuple):
    """A sentence without one of its words."""

    before: str
    word: str
    after: str


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Sentences of some length, as they stand in the texts."""
    for text in texts:
        for sentence in map(str.strip, PARTING.split(text)):
            if sentence[-1:] in tuple(".?!") and WORDS[0] <= len(sentence.split()) <= WORDS[1]:
                yield sentence


def hide_words(texts: Iterable[str], count: int = SENTENCES) -> list[Hidden]:
    """A word of each of the first `count` sentences, drawn evenly; always the same ones."""
    hidden = []
    found = ((sentence, list(WORD.finditer(sentence))) for sentence in sentences(texts))
    for sentence, words in itertools.islice((pair for pair in found if pair[1]), count):
        word = words[int(random_bits(np.arange(len(hidden), len(hidden) + 1))[0]) % len(words)]
        hidden.append(Hidden(sentence[: word.start()], word[0], sentence[word.end() :]))
    return hidden


def commonest_word(texts: Iterable[str]) -> str:
    """The word that a guess without looking at the sentence takes: the commonest of the texts."""
    words = (word[0] for sentence in sentences(texts) for word in WORD.finditer(sentence))
    counts = collections.Counter(words)
    return counts.most_common(1)[0][0] if counts else ""


def masked(generator: TextGenerator, sentence: Hidden) -> str:
    """The sentence as a prompt: the first of the model's masks stands for the word."""
    return f"{sentence.before}{generator.filling.names(generator.tokenizer)[0]}{sentence.after}"


def fill_hidden(generator: TextGenerator, hidden: list[Hidden]) -> list[Filled | None]:
    """What the model fills in for each word, taking the likeliest token each time.

    Args:
      generator: its `filling` writes into blanks.
      hidden: the sentences.

    Returns:
      For each, the filled sentence; None where the model's context does not hold it.
    """
    greedy, filled = Sampling(temperature=0.0), []
    for first in range(0, len(hidden), ROWS):
        prompts = [masked(generator, sentence) for sentence in hidden[first : first + ROWS]]
        fit = [_fits(generator, prompt) for prompt in prompts]
        found = iter(generator.fill(list(itertools.compress(prompts, fit)), greedy, LONGEST))
        filled += [next(found) if fits else None for fits in fit]
    return filled


def spelt(tokenizer: Tokenizer, word: str) -> str | None:
    """The word as its tokens say it, perhaps in lower case; None where they do not hold it."""
    tokens = tokenizer.encode(word)
    return None if tokenizer.unknown in tokens else tokenizer.decode(tokens).strip() or None


def share_recovered(filled: Sequence[Filled | None], words: Sequence[str | None]) -> float:
    """The share of the words that were filled in exactly; there is one or more.

    Args:
      filled: of `fill_hidden`.
      words: what was hidden, as the model can write it (`spelt`); None: it cannot.
    """
    pairs = zip(filled, words, strict=True)
    right = sum(
        text is not None and word is not None and text.blanks[0] == word for text, word in pairs
    )
    return right / len(words)


def _fits(generator: TextGenerator, prompt: str) -> bool:
    try:
        blanked = generator.filling.read(generator.tokenizer, prompt)
        generator.filling.share(blanked, generator.generator.config.max_length)
    except UserError:
        return False
    return True
