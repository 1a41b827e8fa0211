"""Near-duplicates of a whole corpus, across its collections, and of earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt64

from lmjax.config import UserError, config
from lmjax.data.cleaning.corpus_step import (
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
from lmjax.data.cleaning.duplicates import EARLIER, are_first, shard_verdicts
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document

COMPARED = 1 << 12  # pairs whose signatures are read together: a few megabytes


@config
class NearDuplicates(CorpusStep):
    """Keeps the first document of each cluster of near-duplicates, by MinHash.

    The first is that of the collection that comes first. FineWeb takes 14 bands of 8 rows (Penedo
    et al. 2024, arXiv:2406.17557), MT-NLG 20 of 13, GPT-3 10 hashes. Documents that share a band
    are candidates; with `similarity` their signatures decide, so that many bands of few rows find
    nearly all that are similar and keep those that are not.
    """

    minhash: MinHash = MinHash()  # n-grams and bands
    # least similarity (Jaccard) that the signatures of two candidates must show; 0: all are taken
    similarity: float = 0.0
    earlier: tuple[str, ...] = ()  # outputs of cleanings whose documents are known already

    def validate(self) -> None:
        """Raises UserError for a similarity that is none."""
        if not 0 <= self.similarity <= 1:
            raise UserError(f"similarity={self.similarity}: must be from 0 to 1")

    def mark(self, documents: Sequence[Document]) -> Arrays:
        """See `CorpusStep.mark`: a key for each band, and the signature where it decides."""
        signatures = self.minhash.signatures([document.text for document in documents])
        # A column, which is a band, lies together in the file.
        found = {"keys": np.asfortranarray(self.minhash.keys(signatures))}
        return found | ({"signatures": signatures} if self.similarity else {})

    def decide(self, shards: Sequence[Arrays]) -> Decided:
        """See `CorpusStep.decide`."""
        before = earlier_marks(self.earlier, self)
        known = sum(len(shard["keys"]) for shard in before)
        firsts = clusters([*before, *shards], self.similarity)
        verdicts, copies = shard_verdicts(firsts, known, edges(shards, "keys"))
        return Decided(verdicts, pairs=sampled_pairs(copies, firsts[known:]))

    def apply(
        self, documents: Iterable[Document], verdict: Arrays, tell: Tell
    ) -> Iterator[Document | Dropped]:
        """See `CorpusStep.apply`."""
        begin = int(verdict["begin"])
        for number, (document, first) in enumerate(zip(documents, verdict["firsts"].tolist())):
            if first == begin + number:
                yield document
            elif first == EARLIER:
                yield Dropped("nearly a document of an earlier cleaning")
            else:
                yield Dropped("nearly an earlier document", f"document {first}")

    def kept(self, verdict: Arrays) -> Arrays:
        """See `CorpusStep.kept`."""
        names = ("keys", "signatures") if self.similarity else ("keys",)
        return dict.fromkeys(names, are_first(verdict))


def clusters(shards: Sequence[Arrays], similarity: float = 0.0) -> Int[np.ndarray, "documents"]:
    """The first document of each one's cluster, band by band; see `first_of_cluster`.

    Memory for a number a document, and for what `in_rounds` takes.

    Args:
        shards: "keys", and "signatures" for a `similarity`.
        similarity: that the signatures of a linked pair show at least.
    """
    begins = edges(shards, "keys")
    parent = np.arange(begins[-1])
    for band in range(shards[0]["keys"].shape[1] if shards else 0):
        for numbers, keys in in_rounds(Column(shards, "keys", band)):
            every = numbers[_pairs(keys)]
            for start in range(0, len(every), COMPARED):
                pairs = every[start : start + COMPARED]
                # Most pairs of a later band are linked already.
                roots = _roots(parent, pairs)
                pairs = pairs[roots[:, 0] != roots[:, 1]]
                if similarity:
                    pairs = pairs[_are_similar(pairs, shards, begins, similarity)]
                for one, other in pairs.tolist():
                    low, high = sorted((_root(parent, one), _root(parent, other)))
                    parent[high] = low
    for start in range(0, len(parent), COMPARED):
        _roots(parent, np.arange(start, min(start + COMPARED, len(parent)))[:, None])
    return parent


def _pairs(keys: UInt64[np.ndarray, "documents"]) -> Int[np.ndarray, "pairs 2"]:
    """Documents with the same key: each with the one before it, and with the first of the key.

    By both a document is linked though one of its fellows has the key by chance.
    """
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    is_first = np.ones(len(order), bool)
    is_first[same] = False
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1][same]
    far = first < same - 1
    pairs = [
        np.stack([order[same - 1], order[same]], 1),
        np.stack([order[first[far]], order[same[far]]], 1),
    ]
    return np.concatenate(pairs)


def _root(parent: np.ndarray, number: int) -> int:
    while (above := parent[number]) != number:
        parent[number] = parent[above]
        number = parent[number]
    return int(number)


def _roots(parent: np.ndarray, numbers: Int[np.ndarray, "rows _"]) -> Int[np.ndarray, "rows _"]:
    """The roots of all numbers; the paths are cut short for later."""
    found = parent[numbers]
    while not np.array_equal(above := parent[found], found):
        found = above
    parent[numbers] = found
    return found


def _are_similar(
    pairs: Int[np.ndarray, "pairs 2"],
    shards: Sequence[Arrays],
    begins: Int[np.ndarray, "begins"],
    similarity: float,
) -> Bool[np.ndarray, "pairs"]:
    """Returns whether the signatures of each pair agree in so large a share."""
    one, other = (_signatures(pairs[:, side], shards, begins) for side in (0, 1))
    return (one == other).mean(1) >= similarity


def _signatures(numbers: np.ndarray, shards: Sequence[Arrays], begins: np.ndarray) -> np.ndarray:
    """The signatures of documents by their numbers over all shards."""
    which = np.searchsorted(begins, numbers, "right") - 1
    width = shards[0]["signatures"].shape[1]
    found = np.empty((len(numbers), width), np.uint32)
    for shard in np.unique(which).tolist():
        here = which == shard
        found[here] = shards[shard]["signatures"][numbers[here] - begins[shard]]
    return found
