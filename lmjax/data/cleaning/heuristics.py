"""Rules of published corpora on the look of a text: Gopher, C4, FineWeb."""

from __future__ import annotations

import re

from lmjax.config import config
from lmjax.data.cleaning.repetition import (
    in_repeated_ngrams,
    most_frequent,
    ngram_numbers,
    repeated_items,
)
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.cleaning.units import (
    ends_terminally,
    split_lines,
    split_paragraphs,
    split_sentences,
    split_words,
    word_texts,
)
from lmjax.data.documents import Document

BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "-", "*", "\u00b7")
ELLIPSES = ("...", "\u2026")
LETTER = re.compile(r"[^\W\d_]")
CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@config
class GopherQuality(Step):
    """Quality rules of MassiveText (Rae et al. 2021, arXiv:2112.11446, appendix A.1).

    In text without spaces each character is a word: the rules on the length of words, on letters
    and on stop words, which are of English, hold for other texts alone.
    """

    least_words: int = 50  # words
    most_words: int = 100_000  # words
    shortest_mean: float = 3.0  # characters of a word, on average
    longest_mean: float = 10.0  # characters of a word, on average
    most_symbols: float = 0.1  # '#', or ellipses, for each word
    most_bullets: float = 0.9  # share of lines that begin with a bullet
    most_ellipses: float = 0.3  # share of lines that end with an ellipsis
    least_alphabetic: float = 0.8  # share of words with a letter
    # of which a text has some
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    least_stop_words: int = 2  # different ones of them; 0 for other languages than English

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        text = document.text
        words, spaceless = word_texts(text)
        count = len(words)
        if count < self.least_words:
            return Dropped("too few words", count)
        if count > self.most_words:
            return Dropped("too many words", count)
        for name, number in (
            ("too many '#'", text.count("#")),
            ("too many ellipses", text.count("...") + text.count("\u2026")),
        ):
            if number / count > self.most_symbols:
                return Dropped(name, number / count)
        lines = split_lines(text)
        bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
        if bullets > self.most_bullets:
            return Dropped("too many lines begin with a bullet", bullets)
        ellipses = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
        if ellipses > self.most_ellipses:
            return Dropped("too many lines end with an ellipsis", ellipses)
        return document if spaceless else self._of_words(document, words)

    def _of_words(self, document: Document, words: list[str]) -> Document | Dropped:
        """The rules for words between blanks."""
        mean = sum(map(len, words)) / len(words)
        if not self.shortest_mean <= mean <= self.longest_mean:
            return Dropped("words too short or too long on average", mean)
        has_letter = LETTER.search
        alphabetic = sum([word[0].isalpha() or bool(has_letter(word)) for word in words])
        alphabetic /= len(words)
        if alphabetic < self.least_alphabetic:
            return Dropped("too few words with a letter", alphabetic)
        found = {*self.stop_words}.intersection(map(str.lower, words))
        if len(found) < self.least_stop_words:
            return Dropped("too few stop words", len(found))
        return document


@config
class GopherRepetition(Step):
    """Repetition rules of MassiveText (Rae et al. 2021, arXiv:2112.11446, appendix A.1, table A1).

    Lines, paragraphs and n-grams count as repeated from their second occurrence on.
    """

    most_lines: float = 0.30  # share of lines that occurred before
    most_paragraphs: float = 0.30  # share of paragraphs that occurred before
    most_line_characters: float = 0.20  # share of characters in such lines
    most_paragraph_characters: float = 0.20  # share of characters in such paragraphs
    # Share of characters in the most frequent n-gram, for n = 2, 3, 4.
    most_frequent: tuple[float, ...] = (0.20, 0.18, 0.16)
    # Share of characters in n-grams that occurred before, for n = 5 to 10.
    most_repeated: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        text = document.text
        for name, items, most, most_characters in (
            ("lines", split_lines(text), self.most_lines, self.most_line_characters),
            (
                "paragraphs",
                split_paragraphs(text),
                self.most_paragraphs,
                self.most_paragraph_characters,
            ),
        ):
            share, characters = repeated_items(items)
            if share > most:
                return Dropped(f"too many repeated {name}", share)
            if characters > most_characters:
                return Dropped(f"too many characters in repeated {name}", characters)
        words, first = split_words(text), 2 + len(self.most_frequent)
        longest = 1 + len(self.most_frequent) + len(self.most_repeated)
        for n, numbers in enumerate(ngram_numbers(words.texts, longest), start=1):
            if 2 <= n < first:
                share, most = most_frequent(words, numbers, len(text)), self.most_frequent[n - 2]
                if share > most:
                    return Dropped(f"too many characters in the most frequent {n}-gram", share)
            if n >= first:
                share = in_repeated_ngrams(words, numbers, len(text))
                if share > self.most_repeated[n - first]:
                    return Dropped(f"too many characters in repeated {n}-grams", share)
        return document


@config
class C4Lines(Step):
    """Rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2), on lines and then on pages.

    Lines that end without a terminal mark, have few words, or speak of JavaScript or of policies
    are left out; marks of citations are taken away; then pages of few sentences, with a curly
    bracket or with placeholder text are dropped.
    """

    terminal: bool = True  # leave out lines that do not end as a sentence does
    least_words: int = 5  # words of a line
    least_sentences: int = 3  # sentences of a page, after its lines were chosen (5 in section 2.2)
    brackets: bool = True  # drop pages with a curly bracket

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        lowered = document.text.lower()
        if "lorem ipsum" in lowered:
            return Dropped("placeholder text")
        if self.brackets and "{" in document.text:
            return Dropped("a curly bracket")
        lines = map(str.strip, CITATION.sub("", document.text).split("\n"))
        text = "\n".join(line for line in lines if self._keeps(line))
        sentences = len(split_sentences(text))
        if sentences < self.least_sentences:
            return Dropped("too few sentences", sentences)
        return document._replace(text=text)

    def _keeps(self, line: str) -> bool:
        if not line or (self.terminal and not ends_terminally(line)) or line.endswith(ELLIPSES):
            return False
        if self.least_words > 1 and len(word_texts(line)[0]) < self.least_words:
            return False
        lowered = line.lower()
        return "javascript" not in lowered and not any(name in lowered for name in POLICIES)


@config
class FineWebQuality(Step):
    """The rules that FineWeb adds to Gopher's and C4's (Penedo et al. 2024, arXiv:2406.17557)."""

    least_terminal: float = 0.12  # share of lines that end as a sentence does
    most_repeated: float = 0.1  # share of characters in lines that occurred before
    most_short: float = 0.67  # share of lines of fewer characters than `short`
    short: int = 30  # characters

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        lines = split_lines(document.text)
        if not lines:
            return Dropped("no text")
        terminal = sum(map(ends_terminally, lines)) / len(lines)
        if terminal <= self.least_terminal:
            return Dropped("too few lines end as a sentence does", terminal)
        _, repeated = repeated_items(lines)
        if repeated >= self.most_repeated:
            return Dropped("too many characters in repeated lines", repeated)
        short = sum(len(line) < self.short for line in lines) / len(lines)
        if short >= self.most_short:
            return Dropped("too many short lines", short)
        return document
