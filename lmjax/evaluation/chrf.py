"""chrF and chrF++ of translations: the numbers that sacrebleu gives.

    corpus_chrf(["the cat sat"], [["the cat sat down"]])
    corpus_chrf(["the cat sat"], [["the cat sat down"]], word_order=2)  # chrF++

They count characters, and so need no tokenizer, in any language (Popovic 2015,
https://aclanthology.org/W15-3049; chrF++ 2017, https://aclanthology.org/W17-4770).
"""

from __future__ import annotations

import collections
import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lmjax.evaluation.bleu import ngram_counts, require_references

CHARACTERS, WORDS, BETA = 6, 0, 2.0  # of sacrebleu's chrF2; chrF++ has word_order=2
Counts = Int[np.ndarray, "orders 3"] | Float[np.ndarray, "orders 3"]
PUNCTUATION = frozenset(string.punctuation)


def corpus_chrf(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    character_order: int = CHARACTERS,
    word_order: int = WORDS,
    beta: float = BETA,
    lowercase: bool = False,
    whitespace: bool = False,
) -> float:
    """chrF of all hypotheses together, in percent.

    Args:
      hypotheses: the translations.
      references: of each hypothesis, one or more, of which the one that gives the best score
        counts.
      character_order: of the longest n-grams of characters.
      word_order: of the longest n-grams of words; 2 is chrF++.
      beta: weight of recall; 1 weighs precision and recall alike.
      lowercase: whether capitals count as small letters.
      whitespace: whether blanks are characters.

    Raises:
      UserError: see `require_references`.
    """
    counts = chrf_counts(
        hypotheses,
        references,
        character_order=character_order,
        word_order=word_order,
        beta=beta,
        lowercase=lowercase,
        whitespace=whitespace,
    )
    return chrf_of(counts.sum(axis=0), beta)


def sentence_chrf(hypothesis: str, references: Sequence[str], **settings: Any) -> float:
    """chrF of one text, in percent; see `corpus_chrf`."""
    return corpus_chrf([hypothesis], [references], **settings)


def chrf_counts(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    character_order: int = CHARACTERS,
    word_order: int = WORDS,
    beta: float = BETA,
    lowercase: bool = False,
    whitespace: bool = False,
) -> Int[np.ndarray, "texts orders 3"]:
    """Counts of each hypothesis, whose sums make a chrF.

    Returns:
      By order of n-grams, first of characters and then of words: those of the hypothesis (0 where
      the reference has none), of the reference, and of both.

    Raises:
      UserError: see `require_references`.
    """
    require_references("chrF", hypotheses, references)

    def grams(text: str) -> list[collections.Counter]:
        text = text.lower() if lowercase else text
        letters = text if whitespace else "".join(text.split())
        found = [ngram_counts(letters, n) for n in range(1, character_order + 1)]
        words = list(_words(text)) if word_order else []
        return found + [ngram_counts(words, n) for n in range(1, word_order + 1)]

    rows = []
    for hypothesis, given in zip(hypotheses, references, strict=True):
        own = grams(hypothesis)
        found = [np.array(list(map(_shared, own, grams(one))), np.int64) for one in given]
        rows.append(max(found, key=lambda counts: chrf_of(counts, beta)))  # the first of equals
    return np.stack(rows)


def chrf_of(counts: Counts, beta: float = BETA) -> float:
    """chrF of counts, or of their sum over texts, in percent.

    The F of the means of precision and recall over the orders that both sides have, as sacrebleu
    has it since its beginning (`eps_smoothing=False`).
    """
    own, wanted, both = np.asarray(counts, np.float64).T
    there = (own > 0) & (wanted > 0)
    if not both[there].any():
        return 0.0
    precision: Float[np.ndarray, ""] = np.mean(both[there] / own[there])
    recall: Float[np.ndarray, ""] = np.mean(both[there] / wanted[there])
    return float(100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall))


def _shared(own: collections.Counter, wanted: collections.Counter) -> tuple[int, int, int]:
    return own.total() if wanted else 0, wanted.total(), (own & wanted).total()


def _words(text: str) -> Iterator[str]:
    """Words, one ASCII mark parted from each: from its end, or else from its beginning."""
    for word in text.split():
        if len(word) > 1 and word[-1] in PUNCTUATION:
            yield from (word[:-1], word[-1])
        elif len(word) > 1 and word[0] in PUNCTUATION:
            yield from (word[0], word[1:])
        else:
            yield word
