"""The contract of a cleaning step."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NamedTuple

from lmjax.config import config
from lmjax.data.documents import Document


class Dropped(NamedTuple):
    """A document that a step leaves out.

    Attributes:
        reason: why, in words that are the same for all documents it holds for: they are counted.
        measured: the number, or the text, that decided.
    """

    reason: str
    measured: float | str = ""


@config
class Step(abc.ABC):
    """Base of the cleaning steps: pure functions of one document, with thresholds as settings."""

    @abc.abstractmethod
    def __call__(self, document: Document) -> Document | Dropped:
        """Gives the document, as it is or with parts left out or replaced, or drops it."""


def apply_steps(steps: Sequence[Step], document: Document) -> Document | Dropped:
    """The document after all steps, or the verdict of the first that drops it."""
    for step in steps:
        result = step(document)
        if isinstance(result, Dropped):
            return result
        document = result
    return document
