"""Words hidden in held-out sentences: the share that a model which fills blanks finds again."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.config import UserError, config
from lmjax.console import Cell, Table
from lmjax.data import PreparedData
from lmjax.data.permutation import random_bits
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator
from lmjax.generation.fill import AutoregressiveInfiller, Filled, infiller_of
from lmjax.generation.generator import Generator
from lmjax.generation.sampling import Sampling
from lmjax.generation.text import TextGenerator

SENTENCES = 400  # of each set
WORDS = 5, 30  # fewest and most of a sentence
ROWS = 50  # sentences at a time
LONGEST = 12  # tokens that the model may take for a word
# Where sentences part: behind . ? ! and at empty lines.
PARTING = re.compile(r"(?<=[.?!])\s+|\n\s*\n")
# Letters behind a space that are all of a word.
WORD = re.compile(r"(?<= )[^\W\d_]+(?![\w-])")


COLUMNS = ("held-out text", "unigram guess", "model")
CAPTION = (
    "The share of words that were found again exactly: one was hidden in each of some hundred "
    "sentences that were held out of training. The guess is always the commonest word of the "
    "training text; the model takes the likeliest token each time. More is better."
)
EXAMPLES = 3  # sentences of each held-out set that are shown


@config
class HiddenWords(Evaluator):
    """Share of words hidden in held-out sentences that a model which fills blanks finds again."""

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed`."""
        model, feed = context.learner.model, context.feed
        filling = infiller_of(feed.objective)

        def evaluate(step: int, params: dict) -> tuple[Table, ...]:
            fills = isinstance(filling, AutoregressiveInfiller)
            if not (fills and filling.names(feed.tokenizer)):
                return ()
            generator = TextGenerator(
                Generator(model, params, merge=False), feed.tokenizer, filling
            )
            rows, examples = recover(generator, feed.prepared)
            if not rows:
                return ()
            return (
                Table("Hidden words", COLUMNS, tuple(rows), CAPTION, more_is_better=True),
                Table("Sentences with a hidden word", ("prompt", "text"), tuple(examples)),
            )

        return evaluate


def recover(
    generator: TextGenerator, prepared: PreparedData
) -> tuple[list[tuple[Cell, ...]], list[tuple[str, str]]]:
    """Scores how many hidden words are found again.

    Sets without sentences are left out.

    Args:
      generator: its `filling` writes into blanks.
      prepared: the held-out sets.

    Returns:
      For each held-out set its name and the shares of a unigram guess and of the model; and the
      first sentences of each set, as prompts and texts that say which word was hidden.
    """
    rows, examples = [], []
    for name, store in prepared.held_out.items():
        hidden = hide_words(map(bytes.decode, store.source_texts()))
        if hidden:
            training = prepared.train.get(name) or next(iter(prepared.train.values()))
            guess = commonest_word(map(bytes.decode, training.source_texts()))
            words = [spelt(generator.tokenizer, sentence.word) for sentence in hidden]
            guesses = [Filled(guess, [spelt(generator.tokenizer, guess)])] * len(hidden)
            filled = fill_hidden(generator, hidden)
            rows.append((name, share_recovered(guesses, words), share_recovered(filled, words)))
            examples += [
                (
                    masked(generator, sentence),
                    f"\n{text.text}\n(held out; hidden was: {sentence.word}; "
                    "filled in: the likeliest tokens)",
                )
                for sentence, text in zip(hidden[:EXAMPLES], filled, strict=False)
                if text is not None
            ]
    return rows, examples


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
    """Fills in each hidden word, taking the likeliest token each time.

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
