"""Toxicity by class: a classifier for each class, as `QualityFilter` has one."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.config import UserError, config
from lmjax.data.cleaning.quality import QualityModel, train_quality
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import BadRecord, Document
from lmjax.files import errors_told, local_path

FORMAT = 1  # of the file


class ToxicityModel(NamedTuple):
    """A classifier for each class; a text may be of several, or of none.

    Attributes:
        names: of the classes.
        classifiers: one for each.
    """

    names: tuple[str, ...]
    classifiers: tuple[QualityModel, ...]

    def scores(self, text: str) -> dict[str, float]:
        """Probability (0 to 1) of each class, with as many texts in it as not."""
        pairs = zip(self.names, self.classifiers, strict=True)
        return {name: classifier.score(text) for name, classifier in pairs}

    def save(self, path: pathlib.Path) -> None:
        """Writes the model. UserError: it cannot be written."""
        arrays = {f"weights{n}": one.weights for n, one in enumerate(self.classifiers)}
        biases = np.array([one.bias for one in self.classifiers])
        with errors_told(f"cannot write {path}"):
            np.savez(path, format=FORMAT, names=np.array(self.names), biases=biases, **arrays)


def load_toxicity(path: pathlib.Path) -> ToxicityModel:
    """Reads a model that `ToxicityModel.save` wrote. UserError: it is none."""
    with errors_told(f"cannot read {path}"):
        try:
            with np.load(path, allow_pickle=False) as found:
                if int(found["format"]) != FORMAT:
                    raise ValueError(f"format {found['format']}")
                names, biases = tuple(map(str, found["names"])), found["biases"].tolist()
                classifiers = tuple(
                    QualityModel(found[f"weights{n}"], bias) for n, bias in enumerate(biases)
                )
                return ToxicityModel(names, classifiers)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is no model of toxicity: {error}") from None


def train_toxicity(
    texts: Sequence[str], labels: Sequence[frozenset[str]], bits: int = 16, epochs: int = 5
) -> ToxicityModel:
    """A classifier for each class against all texts that are not of it.

    Args:
        texts: of all kinds, also of no class.
        labels: classes of each.
        bits: binary logarithm of the number of weights of a class.
        epochs: times that each text is learned from.

    Raises:
        UserError: no text has a class, or all have one.
    """
    names = tuple(sorted(frozenset().union(*labels)))
    if not names:
        raise UserError("no text has a class")
    classifiers = []
    for name in names:
        inside, outside = (
            [text for text, own in zip(texts, labels, strict=True) if (name in own) == wanted]
            for wanted in (True, False)
        )
        if not outside:
            raise UserError(f"all {len(texts)} texts are of the class {name}")
        classifiers.append(train_quality(inside, outside, bits, epochs))
    return ToxicityModel(names, tuple(classifiers))


def classes_of(value: Any, field: str) -> frozenset[str]:
    """Classes of a text, from a name, a list of names, or an object with a number for each.

    BadRecord: the value is nothing of these. An object's class counts from 0.5 on, as the shares of
    annotators in public sets of comments do.
    """
    if isinstance(value, str):
        return frozenset({value} if value else ())
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return frozenset(value)
    if isinstance(value, dict) and all(isinstance(one, int | float) for one in value.values()):
        return frozenset(name for name, number in value.items() if number >= 0.5)
    raise BadRecord(
        f"field {field!r} is {str(value)[:60]!r}: give a name, a list of names, or an object of "
        "names and numbers"
    )


@config
class ToxicityFilter(Step):
    """Drops documents that a classifier (`TrainToxicity`) finds to be of a class of toxic text.

    The scores are kept with the document, so that a mixture may weigh by them.
    """

    model: str  # file of the classifiers: output/toxicity.npz of a `TrainToxicity`
    most_score: float = 0.9  # of every class that `limits` does not name
    limits: tuple[tuple[str, float], ...] = ()  # (class, its largest score)
    field: str = "toxicity"  # metadata with the score of each class; empty: they are not kept

    def validate(self) -> None:
        """Raises UserError for limits that are none."""
        local_path(self.model, "model")
        for name, limit in (("most_score", self.most_score), *self.limits):
            if not 0 <= limit <= 1:
                raise UserError(f"{name}={limit}: must be from 0 to 1")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`. UserError: a class of `limits` is not the model's."""
        model, limits = _model(self.model), dict(self.limits)
        if unknown := set(limits) - set(model.names):
            raise UserError(
                f"limits: {', '.join(sorted(unknown))}: the classes of {self.model} are "
                f"{', '.join(model.names)}"
            )
        scores = model.scores(document.text)
        for name, score in scores.items():
            if score > limits.get(name, self.most_score):
                return Dropped(f"toxic: {name}", score)
        if not self.field:
            return document
        kept = {name: round(score, 4) for name, score in scores.items()}
        return document._replace(metadata={**(document.metadata or {}), self.field: kept})


@functools.lru_cache(maxsize=4)
def _model(path: str) -> ToxicityModel:
    return load_toxicity(local_path(path, "model"))
