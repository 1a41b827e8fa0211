"""Rules for Chinese text, which are counted in characters."""

from __future__ import annotations

import re

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.cleaning.contamination import run_hashes
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.cleaning.units import split_lines
from lmjax.data.documents import Document

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
BLANK = re.compile(r"\s+")
# Marks of Chinese sentences in full width, and those of English ones that are typed in their stead.
MARKS = re.compile("[\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a\u2026,.!?;:]")


@config
class ChineseQuality(Step):
    """Quality rules of ChineseWebText (Chen et al. 2023, arXiv:2311.01149), and one on punctuation.

    Length, length of lines, share of Chinese characters and repeated 13-grams of characters are the
    paper's (WuDaoCorpora, Yuan et al. 2021, asks for 10 Chinese characters). The bounds on
    punctuation are ours: lists of keywords have hardly any, and broken text has little else. The
    paper's words of a list are `BadWordLists(most_per_line=0.5)`. Blanks count for nothing.
    """

    least_characters: int = 200  # of a text
    least_line: float = 10.0  # characters of a line, on average
    least_chinese: float = 0.3  # share of characters that are Chinese ones
    least_marks: float = 0.01  # share of characters that are punctuation
    most_marks: float = 0.3  # share of characters that are punctuation
    ngram: int = 13  # characters that are compared
    most_repeated: float = 0.5  # share of these n-grams that occurred before

    def validate(self) -> None:
        """Raises UserError for n-grams of no characters."""
        if self.ngram < 1:
            raise UserError(f"ngram={self.ngram}: must be 1 or more")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        text = BLANK.sub("", document.text)
        count = len(text)
        if count < max(self.least_characters, 1):
            return Dropped("too few characters", count)
        line = count / len(split_lines(document.text))
        if line < self.least_line:
            return Dropped("lines too short on average", line)
        chinese = len(HAN.findall(text)) / count
        if chinese < self.least_chinese:
            return Dropped("too few Chinese characters", chinese)
        marks = len(MARKS.findall(text)) / count
        if marks < self.least_marks:
            return Dropped("too little punctuation", marks)
        if marks > self.most_marks:
            return Dropped("too much punctuation", marks)
        repeated = repeated_characters(text, self.ngram)
        if repeated > self.most_repeated:
            return Dropped(f"too many repeated {self.ngram}-grams of characters", repeated)
        return document


def repeated_characters(text: str, length: int) -> float:
    """Share of a text's n-grams of characters that occurred before in it."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    # Spread over all bits, since sums of small numbers meet by chance.
    hashes = run_hashes((codes + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93), length)
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0
