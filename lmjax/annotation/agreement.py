"""Agreement of two annotators on the items that both have ranked.

python -m lmjax.annotation.agreement annotations
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.annotation.journal import Journal, read_journals
from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.data.kappa import cohens_kappa
from lmjax.files import local_path
from lmjax.launch import run

CAPTION = (
    "same: share of the pairs of answers of which both say the same (one is better, the other is,"
    " a tie); kappa: Cohen's, of these; tau-b: Kendall's, the mean over items"
)


class Agreement(NamedTuple):
    """Agreement of two annotators.

    Attributes:
      items: that both have ranked.
      pairs: of answers in them.
      same: share of the pairs of which both say the same.
      kappa: Cohen's kappa over the pairs; NaN where both always say one and the same.
      tau: mean over items of Kendall's tau-b; NaN where there is no item that has one.
      untied: items that have a tau-b: neither annotator ranks all answers alike.
    """

    items: int
    pairs: int
    same: float
    kappa: float
    tau: float
    untied: int


def kendalls_tau(one: Sequence[int], other: Sequence[int]) -> float:
    """Kendall's tau-b of two rankings with ties (Kendall 1945).

    (C - D) / sqrt((n - ties of one) (n - ties of the other)), where C and D are the pairs that are
    ordered alike and in contrary ways, and n all pairs.

    Returns:
      From -1 to 1; NaN where one of them ties all.
    """
    pairs = list(zip(_signs(one), _signs(other), strict=True))
    untied = math.prod(sum(pair[side] != 0 for pair in pairs) for side in (0, 1))
    return sum(a * b for a, b in pairs) / math.sqrt(untied) if untied else math.nan


def agreement(rankings: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Agreement:
    """Agreement of two annotators, from the ranks that they give to the answers of each item.

    Each pair of answers counts in both orders, so that kappa does not depend on the order in which
    answers are kept.
    """
    labels: tuple[list[int], list[int]] = [], []
    taus = []
    for ranks in rankings:
        for side, given in zip(labels, ranks, strict=True):
            signs = list(_signs(given))
            side += [*signs, *(-sign for sign in signs)]
        taus.append(kendalls_tau(*ranks))
    taus = [tau for tau in taus if not math.isnan(tau)]
    equal = sum(a == b for a, b in zip(*labels, strict=True))
    return Agreement(
        items=len(rankings),
        pairs=len(labels[0]) // 2,
        same=equal / len(labels[0]) if labels[0] else math.nan,
        kappa=cohens_kappa(*labels),
        tau=sum(taus) / len(taus) if taus else math.nan,
        untied=len(taus),
    )


def _signs(ranks: Sequence[int]) -> Iterator[int]:
    """Of each pair of answers: 1 if the first is better, -1 if the second is, 0 for a tie."""
    for one, other in itertools.combinations(ranks, 2):
        yield (one < other) - (one > other)


def shared_rankings(one: Journal, other: Journal) -> list[tuple[list[int], list[int]]]:
    """The ranks that two annotators give to the same answers, of each item that both have."""
    ranked = [
        {record["item"]: record for record in journal.holding["rank"] if "ranks" in record}
        for journal in (one, other)
    ]
    return [
        (record["ranks"], ranked[1][item]["ranks"])
        for item, record in ranked[0].items()
        if item in ranked[1] and record["answers"] == ranked[1][item]["answers"]
    ]


def agreement_table(journals: Mapping[str, Journal]) -> Table | None:
    """Agreement of every two annotators who have ranked the same; None where there are none."""
    rows: list[tuple[Any, ...]] = []
    for (name, one), (second, other) in itertools.combinations(sorted(journals.items()), 2):
        if rankings := shared_rankings(one, other):
            found = agreement(rankings)
            numbers = found.same, found.kappa, found.tau
            cells = [None if math.isnan(number) else number for number in numbers]
            rows.append((f"{name}, {second}: {found.items} items, {found.pairs} pairs", *cells))
    columns = ("annotators", "same", "kappa", "tau-b")
    return Table("Agreement", columns, tuple(rows), CAPTION, more_is_better=True) if rows else None


@config
class AnnotatorAgreement:
    """Agreement of the annotators of a folder."""

    folder: str | None = None  # the output of lmjax.annotation

    def run(self) -> None:
        """Prints it. UserError where no two annotators have ranked the same."""
        if self.folder is None:
            raise UserError("Which folder? For instance: python -m lmjax.annotation.agreement ann")
        folder = local_path(self.folder, "folder")
        table = agreement_table(read_journals(Path(folder)))
        if table is None:
            raise UserError(f"{folder}: no two annotators have ranked the same items")
        log = RunLog(make_console())
        log.table(table)
        log.console.print(f"\n{CAPTION}.", soft_wrap=True)


if __name__ == "__main__":
    run(AnnotatorAgreement(), positional="folder")
