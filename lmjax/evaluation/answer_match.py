"""Answers that are free texts, compared with right ones: as numbers, and as texts of any script."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction

from lmjax.config import UserError
from lmjax.data.cleaning.units import WORD

# Digits with commas between groups of three, or without; decimals; a power of ten.
NUMBER = re.compile(
    r"(?P<sign>[-+](?=[$€£¥]?\.?\d))?[$€£¥]?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?!\w))?",
    re.ASCII,
)
# Before digits that are no number of their own: m^2, x_{1}, GPT2.
ATTACHED = re.compile(r"[\^_]\{?$|[A-Za-z]$")
# LaTeX writes a fraction so; {a}/{b} in other ways is two numbers.
FRACTION = re.compile(r"(?P<sign>-\s?)?\\[dt]?frac\s*\{?\s*(-?\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
SIMPLE_FRACTION = re.compile(r"\s*(?P<sign>[-+])?\s?(\d+)\s*/\s*(\d+)\s*")
LATEX_SPACES = re.compile(r"\\[,!]|\{(,)\}")
MARKER = "####"  # before the answer in GSM8K
BOX = r"\boxed{"
SPELLINGS = str.maketrans({**dict.fromkeys("−﹣－–", "-"), "．": ".", "⁄": "/"})


def last_number(text: str) -> Fraction | None:
    r"""The number that an answer ends with; None where it has none.

    Of what stands in the last \boxed{}, or else after the last ####, or else of the whole text, the
    last number. Digits may be of any script, such as wide ones in Chinese texts; signs of currency,
    commas between thousands, LaTeX's spaces, and a dot or any punctuation behind the number are no
    part of it: "$\boxed{42}$.", "1,234 left..." and "答案是４２。" have one. "1/2" alone in what
    is searched, and \frac{1}{2}, are fractions. Digits of a word, an index or a power (GPT2, x_1,
    m^2) are no number; Chinese numerals (四十二) are none here.
    """
    text = LATEX_SPACES.sub(r"\1", _marked(text).translate(SPELLINGS))
    text = "".join(str(unicodedata.decimal(one, one)) for one in text)
    if (whole := SIMPLE_FRACTION.fullmatch(text.strip(" $.()"))) and int(whole[3]):
        value = Fraction(int(whole[2]), int(whole[3]))
        return -value if whole["sign"] == "-" else value
    return next(reversed([*_numbers(text)]), None)


def numbers_match(prediction: str, answer: str) -> bool:
    """Returns whether an answer ends with the number of the right one: 42.00 is 42.

    Args:
      prediction: text of a model; without a number it is wrong.
      answer: of people, perhaps with its derivation (GSM8K).

    Raises:
      UserError: the right answer has no number.
    """
    wanted = last_number(answer)
    if wanted is None:
        raise UserError(f"the right answer {answer[-40:]!r} has no number")
    return last_number(prediction) == wanted


def _marked(text: str) -> str:
    """The part of an answer that is marked as the result, or the whole of it."""
    if (box := text.rfind(BOX)) >= 0:
        begin, depth = box + len(BOX), 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[begin:end]
        return text[begin:]  # cut off within the box
    _, mark, rest = text.rpartition(MARKER)
    return rest if mark and any(letter.isdigit() for letter in rest) else text


def _numbers(text: str) -> Iterator[Fraction]:
    """All numbers of a text in their order."""
    at = 0
    for match in FRACTION.finditer(text):
        yield from _plain_numbers(text[at : match.start()])
        if int(match[3]):
            value = Fraction(int(match[2]), int(match[3]))
            yield -value if match["sign"] else value
        at = match.end()
    yield from _plain_numbers(text[at:])


def _plain_numbers(text: str) -> Iterator[Fraction]:
    for match in NUMBER.finditer(text):
        before = text[: match.start()]
        if not match["sign"] and ATTACHED.search(before[-2:]):
            continue
        # Between two numbers, as of a range or a difference, it is no sign.
        negative = match["sign"] == "-" and not re.search(r"[\w)\]}%]$", before[-1:])
        value = Fraction(f"{match['digits'].replace(',', '')}e{match['power'] or 0}")
        yield -value if negative else value


def plain_text(text: str) -> str:
    """A text as answers of any script are compared: without capitals, punctuation, double blanks.

    Unicode's compatibility forms are one (NFKC: wide letters are letters), and punctuation is that
    of Unicode, so that "２。" is "2"; SQuAD's rule, `normalized_answer`, knows ASCII's alone, and
    leaves out English articles.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(one)[0] == "P" else one for one in text)
    return " ".join(kept.split())


def texts_match(prediction: str, answers: Sequence[str]) -> bool:
    """Returns whether a prediction is one of the answers, by the words of their `plain_text`.

    Raises:
      UserError: there is no answer.
    """
    return _words(prediction) in [_words(one) for one in _given(answers)]


def text_f1(prediction: str, answers: Sequence[str]) -> float:
    """Largest F1 between the words of a prediction and those of an answer, as multisets.

    Each character of a script without spaces is a word, as for CMRC 2018 (Cui et al. 2019,
    arXiv:1810.07366). Two texts without words have 1, as in SQuAD 2.0.

    Raises:
      UserError: there is no answer.
    """
    found = collections.Counter(_words(prediction))
    scores = []
    for answer in _given(answers):
        wanted = collections.Counter(_words(answer))
        size = found.total() + wanted.total()
        scores.append(2 * (found & wanted).total() / size if size else 1.0)
    return max(scores)


def _words(text: str) -> list[str]:
    """Words of a plain text; each character of a script without spaces is one."""
    return WORD.findall(plain_text(text))


def _given(answers: Sequence[str]) -> Sequence[str]:
    if not answers or isinstance(answers, str):
        raise UserError(f"give a list of one right answer or more, not {answers!r}")
    return answers
