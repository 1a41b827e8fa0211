"""Exact substrings: runs of many words that a corpus has had before, wherever they begin."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, UInt64

from lmjax.config import UserError, config
from lmjax.data.cleaning.contamination import run_hashes, word_hashes
from lmjax.data.cleaning.corpus_step import (
    Arrays,
    Column,
    CorpusStep,
    Decided,
    Tell,
    earlier_marks,
    edges,
    in_rounds,
)
from lmjax.data.cleaning.duplicates import are_new
from lmjax.data.cleaning.near_duplicates import token_pattern
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document


@config
class ExactSubstrings(CorpusStep):
    """Cuts out all runs of words that were there before, across and within documents.

    (Lee et al. 2022, arXiv:2107.06499, section 4.1, with 50 tokens; RefinedWeb too.) Compared are
    words in lower case without punctuation, of scripts without spaces characters. The paper's
    suffix array holds the corpus in memory; here each run has a hash of 64 bits, which are sorted a
    part at a time: the work folder takes about 1.5 times the text.
    """

    words: int = 50  # of a run; all longer ones consist of these
    least: int = 20  # words of a document that is cut; of less it is dropped (RefinedWeb)
    earlier: tuple[str, ...] = ()  # outputs of cleanings whose runs of words are known already

    def validate(self) -> None:
        """Raises UserError for runs of no words."""
        if self.words < 1:
            raise UserError(f"words={self.words}: must be 1 or more")

    def mark(self, documents: Sequence[Document]) -> Arrays:
        """See `CorpusStep.mark`: a hash of each run, and of each document how many it has."""
        hashes = [run_hashes(self._hashed(document.text), self.words) for document in documents]
        counts = np.array([len(own) for own in hashes], np.int64)
        joined = np.concatenate([np.zeros(0, np.uint64), *hashes])
        return {"hashes": joined[:, None], "counts": counts}

    def decide(self, shards: Sequence[Arrays]) -> Decided:
        """See `CorpusStep.decide`."""
        before = earlier_marks(self.earlier, self)
        every = [*before, *shards]
        again = np.zeros(sum(len(shard["hashes"]) for shard in every), bool)
        for numbers, rows in in_rounds(Column(every, "hashes")):
            order = np.lexsort(rows.T)  # stable: equal rows stay in their order
            again[numbers[order]] = ~are_new(rows[order])
        begins = edges(every, "hashes")[len(before) :]
        return Decided(
            [
                {"again": again[begin:end], "counts": np.asarray(shard["counts"])}
                for shard, (begin, end) in zip(shards, itertools.pairwise(begins.tolist()))
            ]
        )

    def apply(
        self, documents: Iterable[Document], verdict: Arrays, tell: Tell
    ) -> Iterator[Document | Dropped]:
        """See `CorpusStep.apply`."""
        again, at = verdict["again"], 0
        for document, count in zip(documents, verdict["counts"].tolist()):
            own = again[at : at + count]
            at += count
            yield self._without(document, own) if own.any() else document

    def kept(self, verdict: Arrays) -> Arrays:
        """See `CorpusStep.kept`: the runs that were not there before."""
        return {"hashes": ~np.asarray(verdict["again"])}

    def _hashed(self, text: str) -> UInt64[np.ndarray, "words"]:
        return word_hashes(token_pattern(text).findall(text))

    def _without(self, document: Document, again: Bool[np.ndarray, "runs"]) -> Document | Dropped:
        """The document without the words of all runs that were there before."""
        text = document.text
        matches = list(token_pattern(text).finditer(text))
        # One more run covers a word where it begins, one less where it has ended.
        steps = np.zeros(len(matches) + 1, np.int64)
        steps[: len(again)] += again
        steps[self.words : self.words + len(again)] -= again
        cut = np.cumsum(steps)[:-1] > 0
        left = len(matches) - int(cut.sum())
        if left < self.least:
            return Dropped("too few words that were not there before", left)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], cut, [False]])))
        pieces, end = [], 0
        for first, last in edges.reshape(-1, 2).tolist():
            pieces.append(text[end : matches[first].start()])
            end = matches[last].start() if last < len(matches) else len(text)
        pieces.append(text[end:])
        return document._replace(text="\n".join(filter(None, map(str.strip, pieces))))
