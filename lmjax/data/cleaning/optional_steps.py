"""Steps that change what a text says, for those who want them; no recipe has them."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping

from lmjax.config import UserError, config
from lmjax.data.cleaning.perplexity import load_pieces
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.cleaning.units import SPACELESS, split_sentences
from lmjax.data.documents import Document
from lmjax.data.files import open_file, read_blocks
from lmjax.files import local_path
from lmjax.remote import check_path

EMOJI = re.compile(
    "[\u2600-\u27bf\u2b00-\u2bff\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f900-\U0001faff]"
    "[\ufe0f\U0001f3fb-\U0001f3ff]*(?:\u200d[\u2600-\u27bf\U0001f300-\U0001faff]\ufe0f?)*"
)
WORD = re.compile(r"\b[a-z]+\b")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@config
class EmojiToWords(Step):
    """Puts the name of an emoji in Unicode in its place: `:grinning face:`."""

    form: str = ":{}:"  # of a name, which takes the place of {}

    def validate(self) -> None:
        """Raises UserError for a form without a name."""
        if "{}" not in self.form:
            raise UserError(f"form={self.form!r} has no {{}} for the name")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`; no document is dropped."""
        text = EMOJI.sub(self._words, document.text)
        return document if text == document.text else document._replace(text=text)

    def _words(self, match: re.Match[str]) -> str:
        names = (unicodedata.name(sign, "") for sign in match.group())
        # Selectors of a form, skin tones and joiners say nothing more.
        ignored = ("VARIATION", "EMOJI MODIFIER", "ZERO WIDTH")
        kept = [name.lower() for name in names if name and not name.startswith(ignored)]
        return self.form.format(", ".join(kept)) if kept else match.group()


@config
class SpellingCorrection(Step):
    """Replaces unknown words of small letters by a frequent word that differs by one letter.

    One letter too many, too few, wrong, or two in the wrong order (Norvig 2007; after Kernighan et
    al. 1990). The words and their counts are a file of yours; a word that is there is right.
    """

    words: str  # file: a word and its count on each line
    shortest: int = 5  # letters of a word that is looked at
    least: int = 100  # count of a word that is put in place of another

    def validate(self) -> None:
        """Raises UserError for a list that cannot be read."""
        check_path(self.words, "words")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`; no document is dropped."""
        counts = _counts(self.words)
        text = WORD.sub(lambda match: self._right(match.group(), counts), document.text)
        return document if text == document.text else document._replace(text=text)

    def _right(self, word: str, counts: Mapping[str, int]) -> str:
        if len(word) < self.shortest or word in counts:
            return word
        best = max(one_edit(word), key=lambda one: (counts.get(one, 0), one))
        return best if counts.get(best, 0) >= self.least else word


def one_edit(word: str) -> Iterator[str]:
    """All words that differ by one letter, or by the order of two neighbours."""
    for at in range(len(word) + 1):
        left, right = word[:at], word[at:]
        if right:
            yield left + right[1:]
        if len(right) > 1:
            yield left + right[1] + right[0] + right[2:]
        for letter in LETTERS:
            yield left + letter + right
            if right:
                yield left + letter + right[1:]


@config
class SentenceOrder(Step):
    """Lets neighbouring sentences change places where a model of n-grams finds that far likelier.

    The model sees the few words around the border of two sentences alone: it repairs what a page's
    columns have mixed up, and no argument.
    """

    model: str  # output of `TrainPerplexity`
    least_gain: float = 5.0  # of the logarithm of the text's probability, by one exchange
    most_sentences: int = 50  # of a line that is looked at

    def validate(self) -> None:
        """Raises UserError for a model that is no path of this machine."""
        local_path(self.model, "model")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`; no document is dropped. UserError: the model is missing."""
        lines = [self._ordered(line) for line in document.text.split("\n")]
        text = "\n".join(lines)
        return document if text == document.text else document._replace(text=text)

    def _ordered(self, line: str) -> str:
        sentences = split_sentences(line)
        if not 1 < len(sentences) <= self.most_sentences:
            return line
        mark = "" if SPACELESS.search(line) else " "
        best, score, changed = sentences, self._score(mark.join(sentences)), False
        for at in range(len(sentences) - 1):
            other = [*best[:at], best[at + 1], best[at], *best[at + 2 :]]
            value = self._score(mark.join(other))
            if value - score >= self.least_gain:
                best, score, changed = other, value, True
        return mark.join(best) if changed else line

    def _score(self, text: str) -> float:
        model = load_pieces(self.model)
        return float(model.ngrams.log_probabilities(model.tokenizer.encode(text)).sum())


@functools.lru_cache(maxsize=4)
def _counts(path: str) -> Mapping[str, int]:
    """Counts of words. UserError: the file has something else."""
    with open_file(path) as file:
        text = b"".join(read_blocks(file, path)).decode("utf-8-sig", "replace")
    found = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        word, _, count = line.strip().rpartition(" ")
        if not word or not count.isdigit():
            raise UserError(f"{path}, line {number}: give a word and its count, got {line[:60]!r}")
        found[word.strip()] = int(count)
    return found
