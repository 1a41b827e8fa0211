"""Words, sentences, lines and paragraphs of texts, with and without spaces between words.

Rules that were made for English count words between blanks. A Chinese sentence would be one word;
here each character of a script without spaces is one, as in most work on Chinese text.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# Han with its extensions, kana, Thai, Lao, Burmese and Khmer.
_SPACELESS = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
    "\u3040-\u30ff\u31f0-\u31ff\u0e01-\u0e5b\u0e81-\u0edf\u1000-\u109f\u1780-\u17ff"
)
_WIDE_MARKS = "\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\u2018-\u201f\u2026"
SPACELESS = re.compile(f"[{_SPACELESS}]")
WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}{_WIDE_MARKS}]+")
BLANKS = np.array([chr(code).isspace() for code in range(0x3002)])  # there are none beyond
PARAGRAPH_BREAK = re.compile(r"\n[ \t\r]*\n\s*")
# A sentence ends with one of these marks, and closing quotes or brackets after it.
TERMINAL = ".!?\u3002\uff01\uff1f\u2026\u0964\u061f"
CLOSING = "\"'\u201d\u2019\u300d\u300f\uff09)\u00bb]\u3011"
_AFTER = f"[{re.escape(CLOSING)}]*"
SENTENCE_END = re.compile(
    rf"[{TERMINAL}]+{_AFTER}(?=\s|$)|[\u3002\uff01\uff1f]+{_AFTER}"  # blanks follow, or need not
)


class Words(NamedTuple):
    """The words of a text and where they are in it.

    Attributes:
        texts: the words.
        starts, ends: first character of each, and one past its last.
        spaceless: whether most of them are characters of scripts without spaces.
    """

    texts: list[str]
    starts: Int[np.ndarray, "words"]
    ends: Int[np.ndarray, "words"]
    spaceless: bool


def split_words(text: str) -> Words:
    """The words of a text: between blanks, and each character of a script without spaces."""
    if not has_spaceless(text):
        starts, ends = _blank_separated(text)
        return Words(text.split(), starts, ends, False)
    matches = list(WORD.finditer(text))
    texts = [match.group() for match in matches]
    spans = np.array([match.span() for match in matches], np.int64).reshape(-1, 2)
    return Words(texts, spans[:, 0], spans[:, 1], _mostly_characters(texts))


def word_texts(text: str) -> tuple[list[str], bool]:
    """The words of `split_words`, without their spans, and whether most are characters."""
    if not has_spaceless(text):
        return text.split(), False
    texts = WORD.findall(text)
    return texts, _mostly_characters(texts)


def has_spaceless(text: str) -> bool:
    """Returns whether a text has characters of scripts without spaces."""
    return not text.isascii() and SPACELESS.search(text) is not None


def _mostly_characters(words: list[str]) -> bool:
    single = sum(1 for word in words if len(word) == 1 and SPACELESS.match(word))
    return 2 * single > len(words)


def _blank_separated(text: str) -> tuple[Int[np.ndarray, "words"], Int[np.ndarray, "words"]]:
    """First character of each word of `str.split`, and one past its last."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = np.zeros(len(codes) + 2, bool)
    np.logical_not(BLANKS[np.minimum(codes, len(BLANKS) - 1)], out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


def split_lines(text: str) -> list[str]:
    """Lines that are not blank, without blanks at their ends."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def split_paragraphs(text: str) -> list[str]:
    """Paragraphs, between which stand blank lines."""
    return [part for part in map(str.strip, PARAGRAPH_BREAK.split(text)) if part]


def split_sentences(text: str) -> list[str]:
    """Sentences: up to a terminal mark before a blank, or any of a script without spaces.

    A rule of one regular expression: "Dr. Smith" are two. It serves for counts, where no model of
    a language is at hand.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    parts = (text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]))
    return [part for part in map(str.strip, parts) if part]


def ends_terminally(line: str) -> bool:
    """Returns whether a line ends as a sentence does, closing quotes aside."""
    line = line.rstrip()
    return line.endswith(('"', "\u201d")) or line.rstrip(CLOSING).endswith(tuple(TERMINAL))
