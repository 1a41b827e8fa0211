"""A classifier of quality: hashed n-grams of words and logistic regression, with GPT-3's rule.

It learns to tell texts of good sources from those of raw ones, and scores a document by how likely
it is of the good ones.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from lmjax.config import UserError, config
from lmjax.data.cleaning.contamination import run_hashes, word_hashes
from lmjax.data.cleaning.near_duplicates import tokens
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.files import errors_told, local_path

WORDS = 2000  # of a text, its first ones, that are looked at
ORDERS = (1, 2)  # lengths of the n-grams
FORMAT = 1  # of the file


class QualityModel(NamedTuple):
    """Weights of hashed n-grams.

    Attributes:
        weights: of each bucket, whose number is a power of two.
        bias: added to their mean.
    """

    weights: Float32[np.ndarray, "buckets"]
    bias: float

    def score(self, text: str) -> float:
        """Probability (0 to 1) that a text is of the good sources."""
        value = self.bias + sum(self.weights[one].mean() for one in features(text, self.bits))
        return float(1 / (1 + np.exp(-np.clip(value, -60, 60))))

    @property
    def bits(self) -> int:
        """Binary logarithm of the number of buckets."""
        return len(self.weights).bit_length() - 1

    def save(self, path: pathlib.Path) -> None:
        """Writes the model. UserError: it cannot be written."""
        with errors_told(f"cannot write {path}"):
            np.savez(path, format=FORMAT, weights=self.weights, bias=np.float64(self.bias))


def load_quality(path: pathlib.Path) -> QualityModel:
    """Reads a model that `QualityModel.save` wrote. UserError: it is none."""
    with errors_told(f"cannot read {path}"):
        try:
            with np.load(path, allow_pickle=False) as found:
                if int(found["format"]) != FORMAT:
                    raise ValueError(f"format {found['format']}")
                return QualityModel(found["weights"], float(found["bias"]))
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is no model of quality: {error}") from None


def features(text: str, bits: int) -> list[Int[np.ndarray, "_"]]:
    """Buckets of a text's n-grams, for each length; of one without words the bucket 0."""
    words = word_hashes(tokens(text)[:WORDS])
    found = []
    for order in ORDERS:
        runs = run_hashes(words, order)
        # The highest bits of a product depend on all of it.
        buckets = (runs * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)
        found.append(buckets.astype(np.int64) if len(buckets) else np.zeros(1, np.int64))
    return found


def train_quality(
    good: Sequence[str],
    raw: Sequence[str],
    bits: int = 18,
    epochs: int = 5,
    rate: float = 40.0,
    seed: int = 0,
) -> QualityModel:
    """Logistic regression by steps of each text in turn, with rates that fall linearly to zero.

    Both kinds weigh the same, whatever the numbers of texts.

    Args:
        good: texts of sources that are good.
        raw: texts as they come.
        bits: binary logarithm of the number of buckets.
        epochs: times that each text is learned from.
        rate: of the first step.
        seed: of the order.

    Raises:
        UserError: there are no texts of a kind.
    """
    if not good or not raw:
        raise UserError(f"{len(good)} good and {len(raw)} raw texts: some of both are needed")
    every = [(features(text, bits), 1.0) for text in good]
    every += [(features(text, bits), 0.0) for text in raw]
    balance = {1.0: len(every) / 2 / len(good), 0.0: len(every) / 2 / len(raw)}
    weights, bias = np.zeros(1 << bits), 0.0
    rng, step, steps = np.random.default_rng(seed), 0, epochs * len(every)
    for _ in range(epochs):
        for number in rng.permutation(len(every)).tolist():
            found, label = every[number]
            value = bias + sum(weights[one].mean() for one in found)
            error = label - 1 / (1 + np.exp(-np.clip(value, -60, 60)))
            change = rate * (1 - step / steps) * balance[label] * error
            for one in found:
                np.add.at(weights, one, change / len(one))
            bias += 0.01 * change
            step += 1
    return QualityModel(weights.astype(np.float32), float(bias))


def area_under_curve(good: Sequence[float], raw: Sequence[float]) -> float:
    """Probability that a good text has a higher score than a raw one; equal ones count half."""
    scores = np.concatenate([good, raw])
    _, number, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[number]
    first = len(good)
    return float((ranks[:first].sum() - first * (first + 1) / 2) / (first * len(raw)))


@config
class QualityFilter(Step):
    """Drops documents that a classifier (`TrainQuality`) scores low.

    GPT-3's rule keeps a document of the score s if a random number of a Pareto distribution with
    the shape 9 (numpy's) is above 1 - s: with the probability (2 - s)^-9 (Brown et al. 2020,
    arXiv:2005.14165, appendix A). The number depends on the text alone. The Pile takes the shape 3.
    """

    model: str  # file of the classifier: output/quality.npz of a `TrainQuality`
    rule: Literal["pareto", "threshold"] = "pareto"  # how the score decides
    shape: float = 9.0  # of the Pareto distribution
    least_score: float = 0.5  # of rule=threshold
    # the score becomes metadata of the document, by this name; empty: it does not
    field: str = "quality"

    def validate(self) -> None:
        """Raises UserError for a model that cannot be read, or a shape that is none."""
        local_path(self.model, "model")
        if self.shape <= 0:
            raise UserError(f"shape={self.shape}: must be above 0")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        score = _model(self.model).score(document.text)
        if self.rule == "threshold":
            keeps = score >= self.least_score
        else:
            keeps = _uniform(document.text) < keep_probability(score, self.shape)
        if not keeps:
            return Dropped("the score of its quality is low", score)
        if not self.field:
            return document
        return document._replace(
            metadata={**(document.metadata or {}), self.field: round(score, 4)}
        )


def keep_probability(
    score: Float[np.ndarray, "*scores"] | float, shape: float = 9.0
) -> Float[np.ndarray, "*scores"] | float:
    """Probability that GPT-3's rule keeps a document of a score: (2 - score)^-shape."""
    return (2.0 - score) ** -shape


def _uniform(text: str) -> float:
    """A number from 0 to 1 that depends on a text, and on nothing else."""
    hashed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=b"pareto")
    return int.from_bytes(hashed.digest(), "little") / 2**64


@functools.lru_cache(maxsize=4)
def _model(path: str) -> QualityModel:
    return load_quality(local_path(path, "model"))
