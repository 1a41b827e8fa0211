"""Models compared by the answers that people have ranked.

python -m lmjax.annotation prompts=runs/compared/replies.jsonl output=people
python -m lmjax.annotation.model_wins people models=before,after
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lmjax.annotation.journal import Journal, read_journals
from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.evaluation.win_rates import judged_wins
from lmjax.files import local_path
from lmjax.launch import run

COLUMNS = ("models", "win rate", "95% from", "to", "won", "lost", "tied", "agreement", "first")
CAPTION = (
    "Share of items of which the first model's answer is ranked above the second's, ties half; an"
    " item that several people rank is won if all say so. agreement: share of the items that"
    " several rank of which all say the same; first: share of judgements for the answer that was"
    " shown first of both"
)


def ranked_outcomes(
    journals: Mapping[str, Journal], models: Sequence[str], ours: int, theirs: int
) -> tuple[Float[np.ndarray, "items people"], Bool[np.ndarray, "items people"]]:
    """Judgements of two models' answers, for `judged_wins`.

    Args:
      journals: of the annotators, who have ranked answers of lines that have one of each model, in
        the order of the models.
      models: their names.
      ours, theirs: numbers of the two that are compared.

    Returns:
      1 where our answer is ranked above theirs, 0 where below, 0.5 for a tie, NaN where an
      annotator has not ranked the item; and whether our answer was shown before theirs.

    Raises:
      UserError: an item has another number of answers, or none is ranked.
    """
    columns = []
    for name in sorted(journals):
        ranked = {}
        for record in journals[name].holding["rank"]:
            if "ranks" not in record:
                continue
            if len(record["ranks"]) != len(models):
                raise UserError(
                    f"{journals[name].path}: item {record['item']} has {len(record['ranks'])}"
                    f" answers, and there are {len(models)} models: {', '.join(models)}"
                )
            ranked[record["item"]] = record
        columns.append(ranked)
    items = list(dict.fromkeys(item for ranked in columns for item in ranked))
    if not items:
        raise UserError("nobody has ranked answers yet")
    outcomes = np.full((len(items), len(columns)), np.nan)
    in_front = np.zeros(outcomes.shape, bool)
    for (row, item), (column, ranked) in itertools.product(enumerate(items), enumerate(columns)):
        if item in ranked:
            ranks, shown = ranked[item]["ranks"], ranked[item]["shown"]
            outcomes[row, column] = (np.sign(ranks[theirs] - ranks[ours]) + 1) / 2
            in_front[row, column] = shown.index(ours) < shown.index(theirs)
    return outcomes, in_front


def model_wins(journals: Mapping[str, Journal], models: Sequence[str]) -> Table:
    """Every model beside every earlier one; see `ranked_outcomes`."""
    rows: list[tuple[Any, ...]] = []
    for theirs, ours in itertools.combinations(range(len(models)), 2):
        outcomes, in_front = ranked_outcomes(journals, models, ours, theirs)
        found = judged_wins(outcomes, in_front=in_front)
        numbers = *found.rate, found.wins, found.losses, found.ties, found.agreement, found.first
        cells = [None if math.isnan(number) else number for number in numbers]
        rows.append((f"{models[ours]} beside {models[theirs]}", *cells))
    return Table("Wins", COLUMNS, tuple(rows), CAPTION)


@config
class ModelWins:
    """Win rates of models by the rankings of people."""

    folder: str | None = None  # the output of lmjax.annotation
    models: tuple[str, ...] = ()  # names, in the order of each line's answers

    def run(self) -> None:
        """Prints them. UserError where nothing is ranked, or answers are not the models'."""
        if self.folder is None or len(self.models) < 2:
            raise UserError(
                "Which folder, and whose answers? For instance: python -m"
                " lmjax.annotation.model_wins annotations models=before,after"
            )
        folder = Path(local_path(self.folder, "folder"))
        table = model_wins(read_journals(folder), self.models)
        log = RunLog(make_console())
        log.table(table)
        log.console.print(f"\n{CAPTION}.", soft_wrap=True)


if __name__ == "__main__":
    run(ModelWins(), positional="folder")
