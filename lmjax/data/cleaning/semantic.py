"""Duplicates in meaning: near vectors within a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Float32, Int

from lmjax.config import UserError, config
from lmjax.data.cleaning.corpus_step import (
    Arrays,
    CorpusStep,
    Decided,
    Tell,
    earlier_marks,
    edges,
    sampled_pairs,
)
from lmjax.data.cleaning.duplicates import EARLIER, are_first
from lmjax.data.cleaning.embeddings import Embedder, HashedWords
from lmjax.data.cleaning.step import Dropped
from lmjax.data.documents import Document

BLOCK = 1024  # vectors that are compared with those of a cluster together
ROUNDING = 1e-6  # of a cosine in single precision
LEARNED = 256  # vectors for each cluster that k-means looks at, at most
Vectors = Float32[np.ndarray, "documents width"]


@config
class SemanticDuplicates(CorpusStep):
    """Drops documents whose vector is near that of an earlier one in the same cluster.

    SemDeDup (Abbas et al. 2023, arXiv:2303.09540): vectors of length one are divided into clusters
    by k-means, and pairs within a cluster are compared by their cosine; pairs that a cluster's
    border divides are not found. Of near ones the paper keeps the one that is farthest from the
    center of its cluster; here the first stays, that of the collection with priority.

    The number of its cluster, and the cosine with its center, become metadata: with
    `TagBalance(field="cluster")` small clusters are read more often, as Baichuan 2 lets scores of
    clusters decide about sampling (Yang et al. 2023, arXiv:2309.10305, section 2.1).
    """

    embedder: Embedder = HashedWords()  # makes the vectors
    similarity: float = 0.95  # least cosine of two documents, of which the later one is dropped
    clusters: int = 0  # into which the documents are divided; 0: square root of their number
    iterations: int = 20  # of k-means
    seed: int = 0  # of the first centers
    # names of metadata: the cluster, and by "_score" after it the cosine; empty: none
    field: str = "cluster"
    earlier: tuple[str, ...] = ()  # outputs of cleanings whose documents are known already

    def validate(self) -> None:
        """Raises UserError for numbers that have no meaning."""
        if not -1 <= self.similarity <= 1 or self.clusters < 0 or self.iterations < 1:
            raise UserError(
                f"similarity={self.similarity}, clusters={self.clusters}, iterations="
                f"{self.iterations}: must be from -1 to 1, 0 or more, and 1 or more"
            )

    def mark(self, documents: Sequence[Document]) -> Arrays:
        """See `CorpusStep.mark`: vectors of length one, in half precision."""
        return {"vectors": unit_vectors(self.embedder.vectors(documents)).astype(np.float16)}

    def decide(self, shards: Sequence[Arrays]) -> Decided:
        """See `CorpusStep.decide`.

        Memory for all vectors of the largest cluster, and of those that k-means looks at.
        """
        before = earlier_marks(self.earlier, self)
        every = [one for one in (*before, *shards) if len(one["vectors"])]
        known = sum(len(one["vectors"]) for one in before)
        begins = edges(every, "vectors")
        count = int(begins[-1])
        first = np.arange(count)
        clusters, scores = np.zeros(count, np.int64), np.zeros(count, np.float32)
        if count:
            number = min(self.clusters or round(count**0.5) or 1, count)
            chosen = np.random.default_rng(self.seed).permutation(count)[: number * LEARNED]
            centers = k_means(
                gathered(every, begins, np.sort(chosen)), number, self.iterations, self.seed
            )
            for one, begin in zip(every, begins):
                here = slice(begin, begin + len(one["vectors"]))
                clusters[here], scores[here] = nearest(unit_vectors(one["vectors"]), centers)
            order = np.argsort(clusters, kind="stable")
            for members in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
                near = first_near(gathered(every, begins, members), self.similarity)
                first[members] = members[near]
        first = np.maximum(first[known:] - known, EARLIER)
        starts = edges(shards, "vectors")
        verdicts = []
        for shard, begin in zip(shards, starts):
            here = slice(begin, begin + len(shard["vectors"]))
            there = slice(known + begin, known + begin + len(shard["vectors"]))
            found = {"firsts": first[here], "begin": np.array(begin)}
            verdicts.append(found | {"clusters": clusters[there], "scores": scores[there]})
        again = np.flatnonzero((first != np.arange(len(first))) & (first != EARLIER))
        return Decided(verdicts, pairs=sampled_pairs(again, first))

    def apply(
        self, documents: Iterable[Document], verdict: Arrays, tell: Tell
    ) -> Iterator[Document | Dropped]:
        """See `CorpusStep.apply`."""
        begin = int(verdict["begin"])
        columns = (verdict[name].tolist() for name in ("firsts", "clusters", "scores"))
        for number, (document, first, cluster, score) in enumerate(zip(documents, *columns)):
            if first == EARLIER:
                yield Dropped("in meaning a document of an earlier cleaning")
            elif first != begin + number:
                yield Dropped("in meaning an earlier document", f"document {first}")
            elif not self.field:
                yield document
            else:
                found = {self.field: str(cluster), f"{self.field}_score": round(score, 4)}
                yield document._replace(metadata={**(document.metadata or {}), **found})

    def kept(self, verdict: Arrays) -> Arrays:
        """See `CorpusStep.kept`."""
        return {"vectors": are_first(verdict)}


def k_means(
    vectors: Vectors, clusters: int, iterations: int, seed: int
) -> Float32[np.ndarray, "{clusters} width"]:
    """Centers of length one that are near the vectors, by Lloyd's steps on the sphere.

    A center without vectors takes the one that is farthest from its own.

    Args:
        vectors: of length one, at least as many as clusters.
        clusters: how many.
        iterations: steps at most.
        seed: of the vectors that are the first centers.
    """
    chosen = np.random.default_rng(seed).permutation(len(vectors))[:clusters]
    centers, before = vectors[np.sort(chosen)], None
    for _ in range(iterations):
        own, cosine = nearest(vectors, centers)
        if before is not None and np.array_equal(own, before):
            break
        before = own
        sums = np.zeros_like(centers)
        np.add.at(sums, own, vectors)
        empty = np.flatnonzero(np.bincount(own, minlength=clusters) == 0)
        sums[empty] = vectors[np.argsort(cosine, kind="stable")[: len(empty)]]
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), centers)
    return centers


def nearest(
    vectors: Vectors, centers: Float32[np.ndarray, "clusters width"]
) -> tuple[Int[np.ndarray, "documents"], Float32[np.ndarray, "documents"]]:
    """Number of the center with the largest cosine, of several the first, and that cosine."""
    numbers = np.zeros(len(vectors), np.int64)
    cosines = np.zeros(len(vectors), np.float32)
    for start in range(0, len(vectors), BLOCK):
        found = vectors[start : start + BLOCK] @ centers.T
        numbers[start : start + BLOCK] = found.argmax(1)
        cosines[start : start + BLOCK] = found.max(1)
    return numbers, cosines


def first_near(vectors: Vectors, similarity: float) -> Int[np.ndarray, "documents"]:
    """For each vector the first one, perhaps itself, with so large a cosine."""
    found = np.arange(len(vectors))
    for start in range(0, len(vectors), BLOCK):
        stop = min(start + BLOCK, len(vectors))
        near = vectors[start:stop] @ vectors[:stop].T >= similarity - ROUNDING
        near[np.arange(stop - start), np.arange(start, stop)] = True  # itself, whatever rounding
        found[start:stop] = near.argmax(1)
    return found


def gathered(
    shards: Sequence[Arrays], begins: Int[np.ndarray, "begins"], numbers: Int[np.ndarray, "chosen"]
) -> Vectors:
    """The vectors of some documents by their numbers over all shards, which rise."""
    which = np.searchsorted(begins, numbers, "right") - 1
    parts = [
        shards[shard]["vectors"][numbers[which == shard] - begins[shard]]
        for shard in np.unique(which).tolist()
    ]
    return unit_vectors(np.concatenate(parts))


def unit_vectors(vectors: Float[np.ndarray, "documents width"]) -> Vectors:
    """The vectors in single precision, and of length one, which rounding has changed."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
