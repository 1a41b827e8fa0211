"""The language of a text: by its script where that says it, else by hashed n-grams of characters.

The model is naive Bayes over n-grams of one to four characters. It is trained by a command
(`lmjax.jobs.train_language`), and kept in few bytes: a small integer for each bucket and language.
The one that is shipped was trained on the paragraphs of XQuAD (Artetxe et al. 2020,
arXiv:1910.11856; CC BY-SA 4.0).
"""

from __future__ import annotations

import functools
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int8

from lmjax.config import UserError, config
from lmjax.data.cleaning.contamination import run_hashes
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.files import errors_told, local_path

SHIPPED = pathlib.Path(__file__).with_name("languages.npz")
CHARACTERS = 1000  # of a text, its first ones, that are looked at
ORDERS = (1, 2, 3, 4)  # lengths of the n-grams
SCALE = 12.0  # steps of the small integers in a unit of log-probability
FORMAT = 1  # of the file
UNKNOWN = "unknown"  # language of a text without letters
OTHER = re.compile(r"[\W\d_]+")
# Scripts of which one language is meant, before the model is asked: share of the letters that it
# takes. Japanese writes Chinese characters too, so its own signs decide; Chinese has none of them.
SCRIPTS: tuple[tuple[str, re.Pattern[str], float], ...] = (
    ("ja", re.compile("[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff]"), 0.05),
    ("ko", re.compile("[\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e]"), 0.2),
    ("zh", re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"), 0.3),
    ("th", re.compile("[\u0e01-\u0e5b]"), 0.3),
    ("el", re.compile("[\u0370-\u03ff\u1f00-\u1fff]"), 0.5),
    ("he", re.compile("[\u0590-\u05ff]"), 0.5),
)


class LanguageModel(NamedTuple):
    """Log-probabilities of hashed n-grams.

    Attributes:
        names: of the languages, by their codes (ISO 639-1).
        table: of each bucket and language, in steps of 1 / SCALE below the largest of the bucket.
    """

    names: tuple[str, ...]
    table: Int8[np.ndarray, "buckets languages"]

    def scores(self, text: str) -> Mapping[str, float]:
        """Probabilities of the languages of a text, for what the script does not say."""
        buckets = character_features(text, len(self.table).bit_length() - 1)
        if not len(buckets):
            return {UNKNOWN: 1.0}
        # A mean over n-grams, that overlap, and not a sum as if they were independent.
        found = np.take(self.table, buckets, axis=0).sum(0, np.int32)
        value = found / SCALE / len(ORDERS)
        value = np.exp(value - value.max())
        return dict(zip(self.names, (value / value.sum()).tolist(), strict=True))

    def save(self, path: pathlib.Path) -> None:
        """Writes the model. UserError: it cannot be written."""
        with errors_told(f"cannot write {path}"):
            names = np.array(self.names)
            np.savez_compressed(path, format=FORMAT, names=names, table=self.table)


def load_languages(path: pathlib.Path = SHIPPED) -> LanguageModel:
    """Reads a model; by default the one that is shipped. UserError: it is none."""
    with errors_told(f"cannot read {path}"):
        try:
            with np.load(path, allow_pickle=False) as found:
                if int(found["format"]) != FORMAT:
                    raise ValueError(f"format {found['format']}")
                return LanguageModel(tuple(map(str, found["names"])), found["table"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is no model of languages: {error}") from None


def language_of(text: str, model: LanguageModel | None = None) -> tuple[str, float]:
    """Code of a text's language, and its probability.

    The script decides where it has one language here, so that a line of Chinese with the name of a
    product is Chinese.

    Args:
        text: any; of a long one the beginning counts.
        model: None: the one that is shipped.
    """
    letters = OTHER.sub("", text[:CHARACTERS])
    if not letters:
        return UNKNOWN, 1.0
    for name, pattern, share in () if letters.isascii() else SCRIPTS:
        found = len(pattern.findall(letters))
        if found and found >= share * len(letters):
            return name, max(found / len(letters), 0.5)
    scores = (load_shipped() if model is None else model).scores(text)
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


@functools.cache
def load_shipped() -> LanguageModel:
    """The model that is shipped, read once."""
    return load_languages()


def character_features(text: str, bits: int) -> Int[np.ndarray, "_"]:
    """Buckets of the n-grams of a text's letters, in lower case, with one blank between words."""
    text = unicodedata.normalize("NFC", text[:CHARACTERS]).lower()
    text = f" {OTHER.sub(' ', text).strip()} "
    if not text.strip():
        return np.zeros(0, np.int64)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    codes = (codes + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    found = []
    for order in ORDERS:
        runs = run_hashes(codes, order) + np.uint64(order)
        runs = (runs ^ (runs >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        found.append((runs >> np.uint64(64 - bits)).astype(np.int64))
    return np.concatenate(found)


def train_languages(texts: Mapping[str, Iterable[str]], bits: int = 15) -> LanguageModel:
    """Naive Bayes: of each language how often it has the n-grams of a bucket.

    Args:
        texts: by the code of their language.
        bits: binary logarithm of the number of buckets.

    Raises:
        UserError: there are less than two languages.
    """
    counts = {}
    for name, some in texts.items():
        counts[name] = np.zeros(1 << bits)
        for text in some:
            np.add.at(counts[name], character_features(text, bits), 1)
    names = tuple(sorted(counts))
    if len(names) < 2:
        raise UserError(f"languages: {', '.join(names) or 'none'}: at least two are needed")
    return LanguageModel(names, _table(np.stack([counts[name] for name in names], 1)))


def _table(
    counts: Float[np.ndarray, "buckets languages"],
) -> Int8[np.ndarray, "buckets languages"]:
    """Logarithms of shares, each bucket's less its largest, in small steps."""
    shares = (counts + 0.3) / (counts + 0.3).sum(0)
    logarithms = np.log(shares)
    logarithms -= logarithms.max(1, keepdims=True)
    return np.maximum(np.round(logarithms * SCALE), -127).astype(np.int8)


@config
class LanguageFilter(Step):
    """Keeps documents of some languages, and notes the language in the metadata.

    The model that is shipped knows ar, de, el, en, es, hi, ro, ru, th, tr, vi and zh; Japanese,
    Korean and Hebrew are known by their script.
    """

    keep: tuple[str, ...] = ()  # codes of the languages that stay; empty: all
    least_score: float = 0.65  # probability of the language; FineWeb has 0.65, C4 0.99
    field: str = "language"  # name of the metadata; empty: the language is not noted
    model: str | None = None  # file of another model than the shipped one

    def validate(self) -> None:
        """Raises UserError for a model that is no path of this machine, or an unknown language."""
        local_path(self.model or "", "model")
        if self.model is None and self.keep:
            known = {*load_shipped().names, *(name for name, _, _ in SCRIPTS), UNKNOWN}
            if unknown := {*self.keep} - known:
                raise UserError(
                    f"keep: {', '.join(sorted(unknown))}: known are {', '.join(sorted(known))}"
                )

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`."""
        name, score = language_of(document.text, _model(self.model))
        if self.keep and name not in self.keep:
            return Dropped("another language", name)
        if score < self.least_score:
            return Dropped("the language is not sure", score)
        if not self.field:
            return document
        return document._replace(metadata={**(document.metadata or {}), self.field: name})


@functools.lru_cache(maxsize=4)
def _model(path: str | None) -> LanguageModel:
    return load_shipped() if path is None else load_languages(local_path(path, "model"))
