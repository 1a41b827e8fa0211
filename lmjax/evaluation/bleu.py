"""BLEU of translations, of a corpus and of a sentence: the numbers that sacrebleu gives.

    corpus_bleu(["the cat sat"], [["the cat sat down", "a cat sat"]]).score

(Papineni et al. 2002, https://aclanthology.org/P02-1040; Post 2018, arXiv:1804.08771.) The BLEU of
a corpus is no mean of sentences': counts are added up first.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError
from lmjax.evaluation.bleu_tokens import BleuTokenizer, bleu_tokens, require_spaces

Smoothing = Literal["exp", "floor", "add-k", "none"]
AMOUNTS = {"exp": 0.0, "floor": 0.1, "add-k": 1.0, "none": 0.0}
ORDER = 4
REMEDY = "name a tokenizer, such as zh or char"


class Bleu(NamedTuple):
    """A BLEU and what it is made of.

    Attributes:
      score: in percent.
      precisions: of n-grams by their order, smoothed, in percent; 0 where there are none.
      brevity_penalty: at most 1.
      length, reference_length: tokens of the hypotheses, and of the references nearest in length.
    """

    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    length: int
    reference_length: int


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: BleuTokenizer | None = None,
    *,
    lowercase: bool = False,
    smoothing: Smoothing = "exp",
    amount: float | None = None,
    order: int = ORDER,
    effective_order: bool = False,
) -> Bleu:
    """BLEU of all hypotheses together.

    Args:
      hypotheses: the translations.
      references: of each hypothesis, one or more (sacrebleu takes them the other way round).
      tokenizer: see `bleu_tokens`; None is 13a, for languages with spaces.
      lowercase: whether capitals count as small letters.
      smoothing, amount, effective_order: see `bleu_of`.
      order: of the longest n-grams.

    Raises:
      UserError: see `bleu_counts`; or all references are shorter than n-grams of the order, so that
        they would have a BLEU of 0 themselves.
    """
    counts = bleu_counts(hypotheses, references, tokenizer, lowercase=lowercase, order=order)
    longest = max(len(_cut(one, tokenizer, lowercase)) for given in references for one in given)
    if longest < order and not effective_order:
        raise UserError(
            f"BLEU: the longest reference has {longest} tokens, and n-grams are up to {order}, so"
            " that the score of the references themselves is 0: give a smaller order,"
            " effective_order, or another tokenizer (zh, char)"
        )
    return bleu_of(counts.sum(axis=0), smoothing, amount, effective_order)


def sentence_bleu(
    hypothesis: str,
    references: Sequence[str],
    tokenizer: BleuTokenizer | None = None,
    *,
    lowercase: bool = False,
    smoothing: Smoothing = "exp",
    amount: float | None = None,
    order: int = ORDER,
) -> Bleu:
    """BLEU of one text, with the orders of n-grams that it has (effective order), as sacrebleu."""
    counts = bleu_counts([hypothesis], [references], tokenizer, lowercase=lowercase, order=order)
    return bleu_of(counts[0], smoothing, amount, effective_order=True)


def bleu_counts(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: BleuTokenizer | None = None,
    *,
    lowercase: bool = False,
    order: int = ORDER,
) -> Int[np.ndarray, "texts counts"]:
    """Counts of each hypothesis, whose sums make a BLEU: for resampling, see `paired_bootstrap`.

    Returns:
      Tokens of the hypothesis and of the reference nearest in length (of two, the shorter); then by
      order the n-grams that a reference has too, each at most as often; then all n-grams.

    Raises:
      UserError: references that `require_references` refuses, or of a script without spaces where
        no tokenizer is named.
    """
    require_references("BLEU", hypotheses, references)
    if tokenizer is None:
        require_spaces([one for given in references for one in given], "BLEU", REMEDY)
    rows = []
    for hypothesis, given in zip(hypotheses, references, strict=True):
        tokens = _cut(hypothesis, tokenizer, lowercase)
        wanted = [_cut(one, tokenizer, lowercase) for one in given]
        nearest = min(map(len, wanted), key=lambda size: (abs(size - len(tokens)), size))
        right, total = [], []
        for n in range(1, order + 1):
            most: collections.Counter[tuple[str, ...]] = collections.Counter()
            for one in wanted:
                most |= ngram_counts(one, n)
            found = ngram_counts(tokens, n)
            right.append((found & most).total())
            total.append(found.total())
        rows.append([len(tokens), nearest, *right, *total])
    return np.array(rows, np.int64)


def bleu_of(
    counts: Int[np.ndarray, "counts"] | Float[np.ndarray, "counts"],
    smoothing: Smoothing = "exp",
    amount: float | None = None,
    effective_order: bool = False,
) -> Bleu:
    """BLEU of counts, or of their sum over texts.

    Args:
      counts: see `bleu_counts`.
      smoothing: of orders of which no n-gram is right (Chen and Cherry 2014): `exp` halves the
        share anew for each of them; `floor` counts `amount` right; `add-k` adds `amount` to right
        and all, of every order but the first; `none`. A text without a right token is 0 under each.
      amount: None is 0.1 for floor, 1 for add-k.
      effective_order: whether to leave out orders of which the hypotheses have no n-gram; without
        it the BLEU of shorter ones is 0, right as they may be.

    Raises:
      UserError: no such smoothing.
    """
    if smoothing not in AMOUNTS:
        raise UserError(f"smoothing={smoothing!r}: known are {', '.join(AMOUNTS)}")
    added = AMOUNTS[smoothing] if amount is None else amount
    length, reference_length = int(counts[0]), int(counts[1])
    right, total = np.split(np.asarray(counts[2:], np.float64), 2)
    penalty = math.exp(min(0.0, 1 - reference_length / length)) if length else 0.0
    if length >= reference_length:
        penalty = 1.0  # also of nothing where nothing was to be said
    if smoothing == "add-k" and right.any():
        right[1:] += added
        total[1:] += added
    shares, halved = np.zeros(len(right)), 1.0
    orders = len(right)
    for n in range(orders if right.any() else 0):
        if total[n] == 0:
            orders = n if effective_order else orders
            break
        found = right[n]
        if not found and smoothing == "exp":
            halved *= 2
            found = 1 / halved
        elif not found and smoothing == "floor":
            found = added
        shares[n] = found / total[n]
    score = 0.0
    if shares[:orders].all():
        score = 100 * penalty * math.exp(float(np.mean(np.log(shares[:orders]))))
    return Bleu(score, tuple((100 * shares).tolist()), penalty, length, reference_length)


def require_references(
    measure: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Sees that each hypothesis has a list of references of its own.

    Lists the other way round, as sacrebleu takes them, are found but where there are as many of
    them as hypotheses.

    Raises:
      UserError: it is not so.
    """
    if not hypotheses:
        raise UserError(f"{measure}: there is no hypothesis")
    if any(isinstance(given, str) for given in references):
        raise UserError(
            f"{measure}: give a list of references for each hypothesis, also where it is one:"
            f" [{str(references[0])[:20]!r}]"
        )
    if len(references) != len(hypotheses):
        transposed = any(len(given) == len(hypotheses) for given in references)
        raise UserError(
            f"{measure}: {len(references)} lists of references for {len(hypotheses)} hypotheses;"
            " give one list for each hypothesis"
            + (", not one for each set of references (as sacrebleu has them)" * transposed)
        )
    for number, given in enumerate(references):
        if not given:
            raise UserError(f"{measure}: hypothesis {number} has no reference")


def _cut(text: str, tokenizer: BleuTokenizer | None, lowercase: bool) -> list[str]:
    text = text.lower() if lowercase else text
    return bleu_tokens(text.rstrip(), tokenizer or "13a")


def ngram_counts(tokens: Sequence[str], length: int) -> collections.Counter[tuple[str, ...]]:
    """Number of occurrences of each run of so many tokens."""
    return collections.Counter(zip(*(tokens[at:] for at in range(length)), strict=False))
