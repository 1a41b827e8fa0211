"""Comparisons that cost nothing: a passage of any text against itself with words exchanged."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.documents import Document, HashFiles, OnSkip, Part, Source, digest

WORD = re.compile(
    "[\u2e80-\u9fff]|[^\\s\u2e80-\u9fff]+"
)  # of Chinese and Japanese each sign is one
FEWEST = 4  # words of a passage
VERSION = "1"  # to be raised when other comparisons are made of the same texts


@config
class DamagedTexts(Source):
    """Passages of texts, each compared with a copy in which some words have changed places.

    A reward model that learns to tell them apart first needs fewer comparisons by people
    (preference model pretraining, Askell et al. 2021, arXiv:2112.00861, section 4, which takes
    ranked pages of the web). Both sides have the same letters, so that length says nothing.

    Each passage is a group of two documents (data.rows=groups), with the labels of comparisons.
    """

    source: Source  # the texts
    words: int = 64  # most words of a passage
    share: float = 0.15  # of its words that change places with each other

    def validate(self) -> None:
        """Raises UserError for passages that are too short, or a share that is none."""
        if self.words < FEWEST:
            raise UserError(f"words={self.words}: a passage has at least {FEWEST}")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share}: must be above 0, up to 1")

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: those of the texts."""
        return self.source.parts()

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`."""
        texts = self.source.fingerprint(hash_files)
        return digest("DamagedTexts", VERSION, str(self.words), str(self.share), texts)

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`; passages of too few different words are left out."""
        for document in self.source.read(part, on_skip):
            group = document.group or document.text
            for passage in _passages(document.text, self.words):
                damaged = damage(passage, self.share)
                for number, text in enumerate((passage, damaged) if damaged != passage else ()):
                    labels = float(number), float(number), 0.0
                    yield Document(text, document.identity, group, (), document.metadata, labels)


def damage(text: str, share: float) -> str:
    """The text with a share of its words, at least two, in each other's places.

    Which ones is a function of the text alone.
    """
    found = list(WORD.finditer(text))
    count = max(2, round(share * len(found)))
    if len(found) < count:
        return text
    seed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(seed, "little"))
    chosen = generator.permutation(len(found))[:count].tolist()
    words = [word.group() for word in found]
    for index, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        words[index] = found[other].group()
    ends = [0, *(word.end() for word in found)]
    gaps = [text[end : word.start()] for end, word in zip(ends, found)]
    return "".join(gap + word for gap, word in zip(gaps, words, strict=True)) + text[ends[-1] :]


def _passages(text: str, words: int) -> Iterator[str]:
    """Stretches of so many words, one after another; a rest of too few is left out."""
    found = list(WORD.finditer(text))
    for first in range(0, len(found), words):
        piece = found[first : first + words]
        if len(piece) >= FEWEST:
            yield text[piece[0].start() : piece[-1].end()]
