"""Exact duplicates after normalisation: documents, paragraphs, lines, or runs of sentences."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, UInt64

from lmjax.config import UserError, config
from lmjax.data.cleaning.corpus_step import (
    TOGETHER,
    Arrays,
    Column,
    CorpusStep,
    Decided,
    Tell,
    earlier_marks,
    edges,
    in_rounds,
    sampled_pairs,
)
from lmjax.data.cleaning.near_duplicates import tokens
from lmjax.data.cleaning.step import Dropped
from lmjax.data.cleaning.units import PARAGRAPH_BREAK, SENTENCE_END
from lmjax.data.documents import Document

EARLIER = -1  # number of a document of an earlier cleaning


@config
class ExactDuplicates(CorpusStep):
    """Keeps the first of documents, or of their parts, that are equal after normalisation.

    Compared are the words in lower case without punctuation. C4 takes three sentences in a row
    (`unit=sentence run=3`; Raffel et al. 2020, arXiv:1910.10683, section 2.2). Of a repeated part
    the later occurrences are cut out, also within one document.
    """

    unit: Literal["document", "paragraph", "line", "sentence"] = "document"  # what is compared
    run: int = 1  # so many units in a row make one that is compared
    least: int = 30  # characters of a compared part; shorter ones, such as headings, stay
    normalize: Literal["words", "spaces", "nothing"] = "words"  # what is equalised before
    earlier: tuple[str, ...] = ()  # outputs of cleanings whose documents are known already

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        if self.run < 1:
            raise UserError(f"run={self.run}: must be 1 or more")
        if self.unit == "document" and self.run > 1:
            raise UserError(f"run={self.run} is for parts of documents, not for unit=document")

    def mark(self, documents: Sequence[Document]) -> Arrays:
        """See `CorpusStep.mark`: hashes of 128 bits, and of each document how many there are."""
        found, counts = [], []
        for document in documents:
            own = [self._hash(part) for part in self._compared(document.text)]
            found += own
            counts.append(len(own))
        hashes = np.frombuffer(bytearray(b"".join(found)), np.uint64).reshape(-1, 2)
        return {"hashes": hashes, "counts": np.array(counts, np.int64)}

    def decide(self, shards: Sequence[Arrays]) -> Decided:
        """See `CorpusStep.decide`."""
        before = earlier_marks(self.earlier, self)
        firsts = first_equal(Column([*before, *shards], "hashes"))
        known = sum(len(shard["hashes"]) for shard in before)
        verdicts, copies = shard_verdicts(firsts, known, edges(shards, "hashes"))
        if self.unit != "document":
            return Decided(verdicts)
        return Decided(verdicts, pairs=sampled_pairs(copies, firsts[known:]))

    def apply(
        self, documents: Iterable[Document], verdict: Arrays, tell: Tell
    ) -> Iterator[Document | Dropped]:
        """See `CorpusStep.apply`."""
        firsts, begin, at = verdict["firsts"], int(verdict["begin"]), 0
        for document in documents:
            if self.unit == "document":
                first = int(firsts[at])
                yield document if first == begin + at else _copy(first)
                at += 1
                continue
            count = len(self._compared(document.text))
            again = firsts[at : at + count] != begin + np.arange(at, at + count)
            at += count
            yield self._without(document, again) if again.any() else document

    def kept(self, verdict: Arrays) -> Arrays:
        """See `CorpusStep.kept`."""
        return {"hashes": are_first(verdict)}

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Beginnings and ends of the units of a text, each with what separates it from the next."""
        if self.unit == "document":
            return [(0, len(text))]
        if self.unit == "line":
            ends = list(itertools.accumulate(len(line) + 1 for line in text.split("\n")))
        else:
            pattern = PARAGRAPH_BREAK if self.unit == "paragraph" else SENTENCE_END
            ends = [match.end() for match in pattern.finditer(text)]
        ends = [min(end, len(text)) for end in ends]
        spans = itertools.pairwise(dict.fromkeys([0, *ends, len(text)]))
        return [(start, end) for start, end in spans if text[start:end].strip()]

    def _runs(self, text: str) -> list[tuple[int, int]]:
        """Beginnings and ends of all that could be compared."""
        spans = self._spans(text)
        runs = zip(spans, spans[self.run - 1 :])
        return [(start, end) for (start, _), (_, end) in runs if self._is_long(text[start:end])]

    def _is_long(self, part: str) -> bool:
        return self.unit == "document" or len(part.strip()) >= self.least

    def _compared(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self._runs(text)]

    def _hash(self, part: str) -> bytes:
        if self.normalize == "words":
            # A text without words is compared as it is.
            part = " ".join(tokens(part)) or part.strip()
        elif self.normalize == "spaces":
            part = " ".join(part.split())
        return hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def _without(self, document: Document, again: np.ndarray) -> Document | Dropped:
        """The document without the parts that were there before."""
        text, kept, at = document.text, [], 0
        for start, end in itertools.compress(self._runs(text), again):
            kept.append(text[at:start])
            at = max(at, end)
        kept.append(text[at:])
        left = "".join(kept).strip()
        name = f"{self.run} {self.unit}s" if self.run > 1 else f"each {self.unit}"
        return document._replace(text=left) if left else Dropped(f"{name} was there before")


def _copy(first: int) -> Dropped:
    if first == EARLIER:
        return Dropped("a copy of a document of an earlier cleaning")
    return Dropped("a copy of an earlier document", f"document {first}")


def first_equal(
    parts: Sequence[UInt64[np.ndarray, "_ words"]], together: int = TOGETHER
) -> Int[np.ndarray, "rows"]:
    """For each row of several arrays the number of the first equal row, over all of them.

    Memory for a number a row, and for what `in_rounds` takes.

    Args:
        parts: the arrays.
        together: rows that are sorted at a time.
    """
    found = np.empty(sum(len(part) for part in parts), np.int64)
    for numbers, rows in in_rounds(parts, together):
        order = np.lexsort(rows.T)  # stable: equal rows stay in their order
        begins = np.flatnonzero(are_new(rows[order]))
        sizes = np.diff(np.append(begins, len(order)))
        order = numbers[order]
        found[order] = np.repeat(order[begins], sizes)
    return found


def are_new(rows: UInt64[np.ndarray, "rows words"]) -> Bool[np.ndarray, "rows"]:
    """Returns whether each row differs from the one before it."""
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:] != rows[:-1]).any(1)
    return new


def are_first(verdict: Arrays) -> Bool[np.ndarray, "rows"]:
    """Returns whether each row is the first of those it is equal to; see `shard_verdicts`."""
    firsts = verdict["firsts"]
    return firsts == int(verdict["begin"]) + np.arange(len(firsts))


def shard_verdicts(
    firsts: Int[np.ndarray, "rows"], known: int, begins: Int[np.ndarray, "begins"]
) -> tuple[list[Arrays], Int[np.ndarray, "copies"]]:
    """Verdicts on shards from the first row that each one is equal to, or nearly so.

    Args:
        firsts: of the rows of earlier cleanings and of the shards; it is written to, and part of
            the verdicts.
        known: rows of earlier cleanings.
        begins: number of each shard's first row, counted from these on, and of the end.

    Returns:
        "firsts" of each shard, `EARLIER` for one of an earlier cleaning, and where it begins; and
        the rows that are a copy of one of the shards.
    """
    firsts = firsts[known:]
    firsts -= known
    np.maximum(firsts, EARLIER, out=firsts)
    verdicts, copies = [], []
    for begin, end in itertools.pairwise(begins.tolist()):
        own = firsts[begin:end]
        verdicts.append({"firsts": own, "begin": np.array(begin)})
        again = (own != np.arange(begin, end)) & (own != EARLIER)
        copies.append(np.flatnonzero(again) + begin)
    return verdicts, np.concatenate([np.zeros(0, np.int64), *copies])
