"""ROUGE of summaries: the numbers that rouge-score gives for English, and such for other languages.

    rouge("the cat sat", ["the cat sat down"])["rougeL"].f1

(Lin 2004, https://aclanthology.org/W04-1013.) rouge-score knows the letters a to z alone: texts of
other scripts have no words for it, or only the Latin ones in them, so that two different Chinese
sentences that name one model can have 1.0, and two equal ones 0.0. Here such texts have a tokenizer
of their own, or are refused.
"""

from __future__ import annotations

import collections
import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError
from lmjax.data.cleaning.units import SPACELESS
from lmjax.evaluation.bleu import ngram_counts

RougeTokenizer = Literal["english", "unicode"]
RougeKind = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
KINDS: tuple[RougeKind, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ENGLISH = re.compile(r"[a-z0-9]+")
# A character of a script without spaces, or letters and digits with their accents.
UNICODE = re.compile(rf"{SPACELESS.pattern}|(?:(?!{SPACELESS.pattern})[^\W_])+")
SHORTEST = 4  # letters of a word that is stemmed
Tokens = list[str]


class Rouge(NamedTuple):
    """Shares of a summary and a reference that are in both.

    Attributes:
      precision: of the summary.
      recall: of the reference.
      f1: harmonic mean of both; 0 where they are.
    """

    precision: float
    recall: float
    f1: float


def rouge(
    summary: str,
    references: Sequence[str],
    kinds: Sequence[RougeKind] = KINDS,
    tokenizer: RougeTokenizer | None = None,
    stemmed: bool = False,
) -> Mapping[str, Rouge]:
    """ROUGE of a summary beside the reference that gives it the highest F1, of each kind.

    A corpus' is the mean over its texts; as ROUGE-Lsum is of sentences on lines of their own, see
    `split_sentences` for texts without them.

    Args:
      summary: the text.
      references: of people, one or more.
      kinds: rouge1, rouge2: n-grams that both have; rougeL: the longest words that both have in one
        order; rougeLsum: the same by lines, each of the reference beside all of the summary.
      tokenizer: `english` is rouge-score's: small letters a to z and digits, which cuts words at
        accents. `unicode` knows all scripts, and takes each character of one without spaces as a
        word. None is `english`, for texts that it can read.
      stemmed: whether words of four letters or more are cut down to Porter's stems (as in NLTK,
        which rouge-score uses; extra `rouge`).

    Raises:
      UserError: no reference; a reference most of whose letters `english` drops, where no tokenizer
        is named; or stems are asked for without NLTK.
    """
    if not references or isinstance(references, str):
        raise UserError(f"ROUGE: give a list of one reference or more, not {references!r}")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"kinds: {unknown[0]!r}: known are {', '.join(KINDS)}")
    if tokenizer is None:
        _require_english(references)
    cut = functools.partial(rouge_tokens, tokenizer=tokenizer or "english", stemmed=stemmed)
    found: dict[str, Rouge] = {}
    scores = [_scores(summary, reference, kinds, cut) for reference in references]
    for kind in kinds:
        found[kind] = max((one[kind] for one in scores), key=lambda score: score.f1)
    return found


def rouge_tokens(text: str, tokenizer: RougeTokenizer, stemmed: bool = False) -> Tokens:
    """The words of a text; see `rouge`."""
    if tokenizer == "english":
        words = ENGLISH.findall(text.lower())
    else:
        words = UNICODE.findall(unicodedata.normalize("NFKC", text).lower())
    if not stemmed:
        return words
    stem = _stemmer()
    return [stem(word) if len(word) >= SHORTEST else word for word in words]


@functools.cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise UserError(
            "stems are made by NLTK, which is not installed: pip install 'lmjax[rouge]', or leave"
            " out stemmed"
        ) from None
    return functools.cache(PorterStemmer().stem)


def _require_english(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        letters = [letter for letter in text.lower() if letter.isalnum()]
        if 2 * sum(letter.isascii() for letter in letters) < len(letters):
            raise UserError(
                f"ROUGE: reference {number}, {text[:20]!r}..., has letters beside a to z, which the"
                " usual tokenizer drops: name the tokenizer, unicode (or english, for its score)"
            )


def _scores(
    summary: str, reference: str, kinds: Sequence[RougeKind], cut: Callable[[str], Tokens]
) -> dict[str, Rouge]:
    words, wanted = cut(summary), cut(reference)
    found: dict[str, Rouge] = {}
    for kind in kinds:
        if kind == "rougeL":
            both = int(common_lengths(wanted, words)[-1, -1])
            found[kind] = _rouge(both, len(words), len(wanted))
        elif kind == "rougeLsum":
            lines = [[cut(line) for line in text.split("\n")] for text in (summary, reference)]
            both = _shared_by_lines(*lines)
            found[kind] = _rouge(both, len(words), len(wanted))
        else:
            own, other = (ngram_counts(given, int(kind[5:])) for given in (words, wanted))
            found[kind] = _rouge((own & other).total(), own.total(), other.total())
    return found


def _rouge(both: int, words: int, wanted: int) -> Rouge:
    precision, recall = both / max(words, 1), both / max(wanted, 1)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return Rouge(precision, recall, f1)


def common_lengths(one: Tokens, other: Tokens) -> Int[np.ndarray, "rows columns"]:
    """Length of the longest common subsequence of the first i words and the first j.

    Returns:
      For i from 0 to the words of one text, and j from 0 to those of the other.
    """
    numbers = {word: number for number, word in enumerate(dict.fromkeys([*one, *other]))}
    columns = np.array([numbers[word] for word in other], np.int64)
    table = np.zeros((len(one) + 1, len(other) + 1), np.int64)
    for row, word in enumerate(one):
        # One more than at the upper left where the words are equal; else the best so far.
        longer = np.where(columns == numbers[word], table[row, :-1] + 1, table[row, 1:])
        np.maximum.accumulate(longer, out=table[row + 1, 1:])
    return table


def _shared_by_lines(summary: Sequence[Tokens], reference: Sequence[Tokens]) -> int:
    """Words of the union of the common subsequences of each line of a reference with all lines.

    Each word counts at most as often as both texts have it, as in ROUGE 1.5.5.
    """
    left = collections.Counter(word for line in reference for word in line)
    left &= collections.Counter(word for line in summary for word in line)
    count = 0
    for line in reference:
        common = set().union(*(_common(line, other) for other in summary))
        for word in (line[at] for at in sorted(common)):
            count += left[word] > 0
            left[word] -= 1
    return count


def _common(one: Tokens, other: Tokens) -> list[int]:
    """Indices in one text of a longest common subsequence.

    Of several, the one that ROUGE-Lsum counts: from the end, words of the first text are passed
    over before those of the other.
    """
    table: Float[np.ndarray, "rows columns"] = common_lengths(one, other)
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif table[i, j - 1] > table[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return found
