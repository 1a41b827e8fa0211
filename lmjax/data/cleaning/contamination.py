"""Text of evaluation sets, cut out of what is trained on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from lmjax.config import UserError, config
from lmjax.data.cleaning.corpus_step import Arrays, CorpusStep, Decided, Tell
from lmjax.data.cleaning.near_duplicates import token_pattern
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document, Source

# Of the polynomial that hashes a run of words, modulo 2^64: odd, so that it has an inverse.
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 1 << 64)


@config
class Decontaminate(CorpusStep):
    """Cuts out what a document has in common with evaluation sets, by GPT-3's rules.

    (Brown et al. 2020, arXiv:2005.14165, appendix C.) Runs of 13 words, in lower case and without
    punctuation, that an evaluation text has too are cut out with 200 characters on both sides;
    pieces of less than 200 characters are left out, and so are documents that fall into more than
    10 pieces. Runs in more than 10 documents are common phrases and stay. Of scripts without spaces
    each character is a word. The pieces stay one document, with a blank line between two.
    """

    tests: tuple[Source, ...]  # evaluation sets: each text, such as a question, is searched for
    ngram: int = 13  # words that are in both
    shortest: int = 8  # words of an evaluation text that is shorter than that, and searched whole
    margin: int = 200  # characters that are cut out on both sides
    least_piece: int = 200  # characters of a piece that stays
    most_pieces: int = 10  # of a document that stays
    most_documents: int = 10  # that have a run which is taken for a leak

    def validate(self) -> None:
        """Raises UserError for settings that find nothing."""
        if not self.tests:
            raise UserError("tests is empty: give the evaluation sets")
        if not 1 <= self.shortest <= self.ngram:
            raise UserError(f"shortest={self.shortest}: must be from 1 to ngram={self.ngram}")

    def mark(self, documents: Sequence[Document]) -> Arrays:
        """See `CorpusStep.mark`: numbers of the runs in each document, and how many they are."""
        table = _table(self)
        words = [token_pattern(one.text).findall(one.text) for one in documents]
        found = table.found(words)
        counts = np.bincount(found[:, 0], minlength=len(documents)).astype(np.int64)
        return {"runs": found[:, 1], "counts": counts}

    def decide(self, shards: Sequence[Arrays]) -> Decided:
        """See `CorpusStep.decide`."""
        size = len(_table(self).hashes)
        documents = np.zeros(size, np.int64)
        for shard in shards:
            documents += np.bincount(shard["runs"], minlength=size)
        leaks = (documents > 0) & (documents <= self.most_documents)
        verdicts = []
        for shard in shards:
            of = np.repeat(np.arange(len(shard["counts"])), shard["counts"])
            hit = np.zeros(len(shard["counts"]), bool)
            hit[of[leaks[shard["runs"]]]] = True
            verdicts.append({"hit": hit})
        return Decided(verdicts, {"leaks": leaks})

    def apply(
        self, documents: Iterable[Document], verdict: Arrays, tell: Tell
    ) -> Iterator[Document | Dropped]:
        """See `CorpusStep.apply`; each evaluation text that is found in a document is told."""
        for document, hit in zip(documents, verdict["hit"].tolist()):
            yield self._cut(document, verdict["leaks"], tell) if hit else document

    def _cut(self, document: Document, leaks: np.ndarray, tell: Tell) -> Document | Dropped:
        text, table = document.text, _table(self)
        matches = list(token_pattern(text).finditer(text))
        found = table.found([[match.group() for match in matches]], positions=True)
        found = found[leaks[found[:, 1]]]
        for test in dict.fromkeys(table.owners[found[:, 1]].tolist()):
            tell(document, table.names[test])
        pieces, at = [], 0
        for number, first in found[np.argsort(found[:, 2])][:, 1:].tolist():
            begin = matches[first].start() - self.margin
            end = matches[first + int(table.lengths[number]) - 1].end() + self.margin
            if begin > at:
                pieces.append(text[at:begin])
            at = max(at, end)
        pieces = [one.strip() for one in (*pieces, text[at:])]
        pieces = [one for one in pieces if len(one) >= self.least_piece]
        if len(pieces) > self.most_pieces:
            return Dropped("in too many pieces without text of evaluation sets", len(pieces))
        if not pieces:
            return Dropped("nothing is left without text of evaluation sets")
        return document._replace(text="\n\n".join(pieces))


class RunTable(NamedTuple):
    """The runs of words of evaluation sets.

    Attributes:
        hashes: of the runs, by length, and rising within one.
        lengths: words of each.
        owners: number of the first text that has it.
        names: of the texts.
    """

    hashes: UInt64[np.ndarray, "runs"]
    lengths: Int[np.ndarray, "runs"]
    owners: Int[np.ndarray, "runs"]
    names: list[str]

    def found(
        self, texts: Sequence[Sequence[str]], positions: bool = False
    ) -> Int[np.ndarray, "found columns"]:
        """Number of a text and of a run that it has, each once; with its position, each time.

        Args:
            texts: the words of each.
            positions: whether to tell them: numbers of a run's first word.
        """
        counts = np.array([len(words) for words in texts], np.int64)
        ends = np.cumsum(counts)
        words = word_hashes([word for words in texts for word in words])
        columns = []
        for length in np.unique(self.lengths).tolist():
            first = np.searchsorted(self.lengths, length)
            own = self.hashes[first : np.searchsorted(self.lengths, length, "right")]
            hashes = run_hashes(words, length)
            at = np.searchsorted(own, hashes)
            at[at == len(own)] = 0
            here = np.flatnonzero(own[at] == hashes)
            text = np.searchsorted(ends, here, "right")
            inside = here + length <= ends[text]
            here, text = here[inside], text[inside]
            position = here - (ends - counts)[text]
            columns.append(np.stack([text, at[here] + first, position], 1))
        rows = np.concatenate(columns) if columns else np.zeros((0, 3), np.int64)
        rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
        return rows if positions else np.unique(rows[:, :2], axis=0)


@functools.lru_cache(maxsize=4)
def _table(step: Decontaminate) -> RunTable:
    """The runs of a step's evaluation sets. UserError: there are none."""
    texts = (document for source in step.tests for document in source.documents())
    named = ((document.identity, document.text) for document in texts)
    runs = text_runs(named, step.ngram, step.shortest)
    if not runs.names:
        raise UserError(f"tests: no text has shortest={step.shortest} words or more")
    return runs.table()


class TextRuns(NamedTuple):
    """The runs of words of each of some texts.

    Attributes:
        hashes: of the runs of each text, each once.
        lengths: words of each text's runs.
        names: of the texts.
    """

    hashes: list[UInt64[np.ndarray, "runs"]]
    lengths: list[int]
    names: list[str]

    def table(self) -> RunTable:
        """Their runs, each once; there must be one."""
        owner = np.repeat(np.arange(len(self.names)), [len(own) for own in self.hashes])
        every, length = np.concatenate(self.hashes), np.array(self.lengths)[owner]
        order = np.lexsort((owner, every, length))
        every, length, owner = every[order], length[order], owner[order]
        new = np.ones(len(every), bool)
        new[1:] = (every[1:] != every[:-1]) | (length[1:] != length[:-1])
        return RunTable(every[new], length[new], owner[new], self.names)


def text_runs(texts: Iterable[tuple[str, str]], ngram: int, shortest: int) -> TextRuns:
    """Runs of so many words of texts, which are names and texts; of shorter texts all words.

    Texts of fewer words than `shortest` are left out.
    """
    found = TextRuns([], [], [])
    for name, text in texts:
        words = token_pattern(text).findall(text)
        length = min(len(words), ngram)
        if length >= shortest:
            found.hashes.append(np.unique(run_hashes(word_hashes(words), length)))
            found.lengths.append(length)
            found.names.append(name)
    return found


def word_hashes(words: Sequence[str]) -> UInt64[np.ndarray, "words"]:
    """64 bits for each word, the same for capitals and small letters."""
    known = {word: hashlib.blake2b(_bytes(word), digest_size=8).digest() for word in {*words}}
    return np.frombuffer(bytearray(b"".join(map(known.__getitem__, words))), np.uint64)


def _bytes(word: str) -> bytes:
    return word.lower().encode("utf-8", "surrogatepass")


def run_hashes(words: UInt64[np.ndarray, "words"], length: int) -> UInt64[np.ndarray, "runs"]:
    """A hash of each run of so many words: its value as a polynomial, by sums over prefixes."""
    if len(words) < length:
        return np.zeros(0, np.uint64)
    powers, inverses = (
        np.multiply.accumulate(np.full(len(words), base, np.uint64)) for base in (BASE, INVERSE)
    )
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * powers)])
    return (sums[length:] - sums[:-length]) * inverses[: len(words) - length + 1]
