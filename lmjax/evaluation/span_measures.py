"""Measures of answers to questions about a text, by SQuAD's rules, and the choice of a span."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from lmjax.config import UserError

Version = Literal["1.1", "2.0"]
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)


def normalized_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation and English articles, single-spaced."""
    kept = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str], version: Version = "1.1") -> float:
    """1.0 where the prediction is one of the answers after normalization, else 0.0.

    See `answer_f1` for the arguments.
    """
    return max(
        float(normalized_answer(prediction) == normalized_answer(answer))
        for answer in _counted(answers, version)
    )


def answer_f1(prediction: str, answers: Sequence[str], version: Version = "1.1") -> float:
    """Largest F1 between the words of the prediction and those of an answer, as multisets.

    Args:
      prediction: text; "" where no answer was found.
      answers: of people; several are alternatives. In version 2.0 none, or only such as are empty
        after normalization, say that the text has no answer.
      version: rules of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv:1606.05250) or 2.0 (2018,
        arXiv:1806.03822). They differ where a side has no word: 0 in 1.1, in 2.0 1 if neither
        has one, else 0.

    Raises:
      UserError: version 1.1 and no answer.
    """
    return max(_f1(prediction, answer, version) for answer in _counted(answers, version))


def _f1(prediction: str, answer: str, version: Version) -> float:
    found, wanted = normalized_answer(prediction).split(), normalized_answer(answer).split()
    if version == "2.0" and not (found and wanted):
        return float(found == wanted)
    shared = (collections.Counter(found) & collections.Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def _counted(answers: Sequence[str], version: Version) -> Sequence[str]:
    """The answers that predictions are compared with."""
    if version == "2.0":
        return [answer for answer in answers if normalized_answer(answer)] or [""]
    if not answers:
        raise UserError("a question of SQuAD 1.1 has an answer; without one it is of version 2.0")
    return answers


def answer_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], version: Version = "1.1"
) -> Mapping[str, float]:
    """Mean exact match and F1 over questions, in percent as SQuAD reports them.

    In version 2.0 also of the questions with an answer, "answerable_...", and of those without,
    "unanswerable_...", where there are any.

    Args:
      predictions: one for each question; "" for no answer.
      answers: of each question; see `answer_f1`.
      version: see `answer_f1`.
    """
    questions = list(zip(predictions, answers, strict=True))
    groups = {"": questions}
    if version == "2.0":
        there = [any(map(normalized_answer, given)) for given in answers]
        for prefix, kind in (("answerable_", True), ("unanswerable_", False)):
            groups[prefix] = [q for q, has in zip(questions, there, strict=True) if has == kind]
    scores = {}
    for prefix, group in groups.items():
        if group:
            for name, measure in (("exact_match", exact_match), ("f1", answer_f1)):
                values = [measure(found, given, version) for found, given in group]
                scores[prefix + name] = 100 * float(np.mean(values))
    return scores


class FoundSpan(NamedTuple):
    """A span of tokens and its score.

    Attributes:
      start: index of the first token.
      end: index of the last token.
      score: start logit plus end logit.
      margin: the score less that of no span, the text's first token as start and end.
    """

    start: int
    end: int
    score: float
    margin: float


def best_span(
    starts: Float[np.ndarray, "seq"],
    ends: Float[np.ndarray, "seq"],
    allowed: Bool[np.ndarray, "seq"],
    first: int = 0,
    longest: int = 30,
) -> FoundSpan:
    """The span of the highest score (Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3).

    A text has no answer, for SQuAD 2.0, where `margin` is not above a threshold that is best on
    held-out questions.

    Args:
      starts, ends: logits of a `SpanHead`.
      allowed: tokens that a span may have at its ends: those of the context, not of the question.
      first: index of the text's first token.
      longest: most tokens of a span.

    Raises:
      UserError: no token is allowed.
    """
    if not allowed.any():
        raise UserError("no token of the text may be in a span")
    index = np.arange(len(starts))
    length = index[None] - index[:, None] + 1
    fits = (length >= 1) & (length <= longest) & allowed[:, None] & allowed[None]
    scores = np.where(fits, starts[:, None] + ends[None], -np.inf)
    start, end = np.unravel_index(np.argmax(scores), scores.shape)
    score = float(scores[start, end])
    return FoundSpan(int(start), int(end), score, score - float(starts[first] + ends[first]))
