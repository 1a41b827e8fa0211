"""Words of lists, whose texts or parts of texts are left out."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.languages import language_of
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.cleaning.units import SPACELESS, split_lines, split_paragraphs, split_sentences
from lmjax.data.documents import Document
from lmjax.data.files import open_file, read_blocks
from lmjax.remote import check_path

Unit = Literal["document", "paragraph", "line", "sentence"]


@config
class BadWords(Step):
    """Leaves out what has a word of a list, such as the one that C4 used.

    A word of letters with blanks between words counts where it stands alone; one of a script
    without spaces wherever it occurs.
    """

    words: tuple[str, ...]  # in lower case
    unit: Unit = "document"  # what is left out

    def validate(self) -> None:
        """Raises UserError for a list without a word."""
        if not any(word.strip() for word in self.words):
            raise UserError("words is empty: give the words of the list")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        return without_words(document, self.words, self.unit)


@config
class BadWordLists(Step):
    """Leaves out what has words of the list of its language; the lists are files of yours.

    A file has a word or phrase a line. The language is that of the metadata, or else of the text.
    C4 drops a page for one word (Raffel et al. 2020, arXiv:1910.10683, section 2.2); ChineseWebText
    a text with more than half a word for each line (Chen et al. 2023, arXiv:2311.01149).
    """

    path: str  # of the lists, with {} for the code of the language: "badwords/{}.txt"
    languages: tuple[str, ...]  # codes of the languages that there is a list for
    unit: Unit = "document"  # what is left out
    most_per_line: float = 0.0  # words of the list for each line that a document may have
    field: str = "language"  # name of the metadata with the code

    def validate(self) -> None:
        """Raises UserError for lists that cannot be found, or numbers that have no meaning."""
        check_path(self.path, "path")
        if "{}" not in self.path or not self.languages:
            raise UserError(
                f"path={self.path}, languages={self.languages}: give a path with {{}} for the code "
                "of the language, and the codes"
            )
        if self.most_per_line < 0 or (self.most_per_line and self.unit != "document"):
            raise UserError(
                f"most_per_line={self.most_per_line}: 0 or more, and for unit=document alone"
            )

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`; a document of another language is kept. UserError: a list is missing."""
        language = (document.metadata or {}).get(self.field) or language_of(document.text)[0]
        if language not in self.languages:
            return document
        words = read_words(self.path.format(language))
        if not self.most_per_line:
            return without_words(document, words, self.unit)
        found = len(word_pattern(words).findall(document.text.lower()))
        share = found / max(len(split_lines(document.text)), 1)
        if share > self.most_per_line:
            return Dropped("too many words of the list", share)
        return document


def without_words(document: Document, words: tuple[str, ...], unit: Unit) -> Document | Dropped:
    """The document without the units that have a word; dropped where nothing is left."""
    pattern = word_pattern(words)
    if unit == "document":
        found = pattern.search(document.text.lower())
        return document if found is None else Dropped("a word of the list", found.group())
    split, mark = {
        "paragraph": (split_paragraphs, "\n\n"),
        "line": (lambda text: text.split("\n"), "\n"),
        "sentence": (split_sentences, " "),
    }[unit]
    if not pattern.search(document.text.lower()):
        return document
    if unit == "sentence":
        # Within a line, so that the lines and blanks of what is kept stay.
        lines = [_sentences(line, pattern) for line in document.text.split("\n")]
        text = "\n".join(line for line in lines if line is not None)
    else:
        text = mark.join(part for part in split(document.text) if not pattern.search(part.lower()))
    return document._replace(text=text) if text.strip() else Dropped("nothing is left")


def _sentences(line: str, pattern: re.Pattern[str]) -> str | None:
    """A line without the sentences that have a word; None: it had no other."""
    if not pattern.search(line.lower()):
        return line
    kept: Sequence[str] = [one for one in split_sentences(line) if not pattern.search(one.lower())]
    spaceless = SPACELESS.search(line) is not None
    return ("" if spaceless else " ").join(kept) if kept else None


@functools.lru_cache(maxsize=16)
def word_pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """One regular expression for all words."""
    ordered = sorted({word.strip() for word in words if word.strip()}, key=len, reverse=True)
    spaced = [re.escape(word) for word in ordered if not SPACELESS.search(word)]
    inside = [re.escape(word) for word in ordered if SPACELESS.search(word)]
    alone = [rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)"] if spaced else []
    return re.compile("|".join([*alone, *inside]))


@functools.lru_cache(maxsize=64)
def read_words(path: str) -> tuple[str, ...]:
    """The words of a list, in lower case. UserError: it cannot be read, or is empty."""
    with open_file(path) as file:
        text = b"".join(read_blocks(file, path)).decode("utf-8-sig", "replace")
    found = tuple(filter(None, (line.strip().lower() for line in text.split("\n"))))
    if not found:
        raise UserError(f"{path}: the list has no word")
    return found
