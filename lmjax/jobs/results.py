"""results.json: the tables that a run's evaluators have made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmjax.console import Table
from lmjax.evaluation.text_baselines import compare as compare  # its name before there were tables


@dataclasses.dataclass(frozen=True)
class Results:
    """Tables of a run, and what they are of.

    Attributes:
      step: steps done when they were made; 0 before there are any.
      parameters: number of parameters of the model.
      tables: of all evaluators, the newest of each title.
      seconds: from the first line of the run to its last one; None where it was resumed.
      tiles: numbers at the head of the report, each with its name; none: means of the tables.
    """

    step: int = 0
    parameters: int = 0
    tables: tuple[Table, ...] = ()
    seconds: float | None = None
    tiles: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The results as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Results:
        """The results that `to_json` gave; empty ones from an empty dictionary."""
        known = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        tables = tuple(map(Table.from_json, found.pop("tables", ())))
        tiles = tuple(map(tuple, found.pop("tiles", ())))
        return cls(tables=tables, tiles=tiles, **found)

    def with_tables(self, tables: tuple[Table, ...], step: int) -> Results:
        """The results after `step` steps, with new tables in place of those of their titles."""
        kept = {table.title: table for table in (*self.tables, *tables)}
        return dataclasses.replace(self, step=step, tables=tuple(kept.values()))
