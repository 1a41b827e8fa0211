"""Perplexity by a model of n-grams: a band of it for each language, as CCNet takes thirds."""

from __future__ import annotations

import functools
import pathlib
from typing import Literal, NamedTuple

from lmjax.config import UserError, config
from lmjax.data.cleaning.languages import language_of
from lmjax.data.cleaning.ngram_model import NgramModel, load_ngrams
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.data.tokenizers import Tokenizer, load_tokenizer
from lmjax.files import local_path

MODEL, TOKENIZER = "ngrams.npz", "tokenizer"  # in the output of `TrainPerplexity`
CHARACTERS = 20_000  # of a text, its first ones, that are looked at


class PieceModel(NamedTuple):
    """A model of n-grams and the tokenizer of its pieces."""

    tokenizer: Tokenizer
    ngrams: NgramModel

    def perplexity(self, text: str) -> float:
        """Perplexity of a piece of a text."""
        return self.ngrams.perplexity(self.tokenizer.encode(text[:CHARACTERS]))


@config
class Perplexity(Step):
    """Keeps documents within a band of perplexity, by a model for each language.

    Perplexities are compared with those of the documents that `TrainPerplexity` has looked at:
    CCNet (Wenzek et al. 2020, arXiv:1911.00359, section 4.2) calls the third with the lowest ones
    head, the others middle and tail. Very low ones are those of boilerplate and of lists, so that a
    band may have a lower end too.
    """

    models: str  # outputs of `TrainPerplexity`, with {} for the code: "runs/perplexity/{}"
    languages: tuple[str, ...]  # codes of the languages that there is a model for
    least_quantile: float = 0.0  # share of the compared documents that are lower, at least
    most_quantile: float = 1.0  # share of these at most; 2/3: head and middle
    others: Literal["keep", "drop"] = "keep"  # what happens to documents of other languages
    # names of metadata: the perplexity, and by "_part" after it head, middle or tail; empty: none
    field: str = "perplexity"
    language: str = "language"  # name of the metadata with the code of the language

    def validate(self) -> None:
        """Raises UserError for models that cannot be found, or a band that is none."""
        local_path(self.models, "models")
        if "{}" not in self.models and len(self.languages) != 1:
            raise UserError(f"models={self.models} has no {{}} for the code of the language")
        if not 0 <= self.least_quantile < self.most_quantile <= 1:
            raise UserError(
                f"least_quantile={self.least_quantile}, most_quantile={self.most_quantile}: must "
                "rise from 0 to 1"
            )

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`. UserError: a model is missing."""
        about = document.metadata or {}
        code = about.get(self.language) or language_of(document.text)[0]
        if code not in self.languages:
            if self.others == "keep":
                return document
            return Dropped("a language without a model of perplexity", code)
        model = load_pieces(self.models.format(code))
        value = model.perplexity(document.text)
        quantile = model.ngrams.quantile(value)
        if quantile < self.least_quantile:
            return Dropped("the perplexity is low", value)
        if quantile > self.most_quantile:
            return Dropped("the perplexity is high", value)
        if not self.field:
            return document
        found = {self.field: round(value, 1), f"{self.field}_part": part_of(quantile)}
        return document._replace(metadata={**about, **found})


def part_of(quantile: float) -> Literal["head", "middle", "tail"]:
    """CCNet's name for a third of the documents, by the share of those with lower perplexity."""
    return "head" if quantile < 1 / 3 else "middle" if quantile < 2 / 3 else "tail"


@functools.lru_cache(maxsize=16)
def load_pieces(folder: str) -> PieceModel:
    """Reads the output of `TrainPerplexity`. UserError: it is none."""
    path: pathlib.Path = local_path(folder, "models")
    if not (path / MODEL).is_file():
        raise UserError(
            f"models: {folder} has no model of perplexity ({MODEL}): "
            "train one with python -m lmjax.jobs.train_perplexity"
        )
    return PieceModel(load_tokenizer(path / TOKENIZER), load_ngrams(path / MODEL))
