"""Labelled data of the jobs that train heads: its sources, their classes, and heads that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError, replace
from lmjax.console import RunLog
from lmjax.data import Data, Domain, Source
from lmjax.models.label_heads import HeadConfig

SHOWN = 12  # names of classes that are told


def sources_of(data: Data) -> tuple[Source, ...]:
    """Sources of all texts, those of evaluation too."""
    pairs = ((domain.source, domain.evaluation) for domain in data.train)
    return tuple(source for pair in pairs for source in pair if source is not None)


def with_labels(data: Data, labels: Any) -> Data:
    """The data with the same names of classes in all of its sources."""

    def named(source: Source | None) -> Source | None:
        return None if source is None else replace(source, labels=labels)

    def with_names(domain: Domain) -> Domain:
        source, evaluation = named(domain.source), named(domain.evaluation)
        return replace(domain, source=source, evaluation=evaluation)

    return replace(data, train=tuple(map(with_names, data.train)))


def check_head(head: HeadConfig, outputs: int, names: Sequence[str], things: str) -> None:
    """Raises UserError for a head that has other classes than the data.

    Args:
      head: of the model.
      outputs: that it should have.
      names: of the classes.
      things: that have them, such as "texts".
    """
    if head.outputs != outputs or (head.labels and head.labels != names):
        raise UserError(
            f"the head {head.name!r} of model.heads has {head.outputs} outputs"
            f" {head.labels or ''}; the {things} have {outputs} classes: {', '.join(names)}"
        )


def log_classes(log: RunLog, names: Sequence[str], before: str = "") -> None:
    """Tells the names of classes, behind some text."""
    more = f", ... ({len(names)})" if len(names) > SHOWN else ""
    log.fact("classes", before + ", ".join(names[:SHOWN]) + more)
