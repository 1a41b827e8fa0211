"""Terminal output of commands: facts, phases, bars, tables."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
from rich.console import Console
from rich.filesize import decimal
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from lmjax.config import UserError

LABEL = 12  # width of the names on the left
SAMPLE_LINES = 8  # of each sample; the report has all of it
PICTURE = 12  # most rows of a matrix that the terminal shows
PLAIN_LINES = 4  # lines of a conversion's phase where there is no terminal


def make_console() -> Console:
    """The console of this process; only the first process of a run speaks."""
    return Console(highlight=False, quiet=jax.process_index() > 0)


Cell = str | float | int | None  # an int is a count


@dataclasses.dataclass(frozen=True)
class Table:
    """A result of a run as terminal, report and results.json show it.

    Attributes:
      title: of the table, such as "Bits per byte"; its name in results.json.
      columns: names of the columns; the first one names the rows.
      rows: a cell for each column: a number, text, or None where there is none.
      caption: what is measured, and how.
      more_is_better: of numbers, whether the largest of a row is the best; None: neither.
      notes: remarks on rows, a line each.
      picture: that the report draws. Of a "matrix" the cells between the first and the last column
        are shares, and the terminal leaves out a large one; of a "calibration", columns are named
        "predicted" and "agreement", and rows after their set, as "talk, 0.5 to 0.6"; of "lines",
        rows are named by rising numbers, and each column is a line over them; of "pairs" the texts
        of a row stand beside each other.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    more_is_better: bool | None = None
    notes: tuple[str, ...] = ()
    picture: Literal["matrix", "calibration", "lines", "pairs"] | None = None

    @property
    def is_text(self) -> bool:
        """Returns whether cells beside the rows' names hold text, as samples do, not numbers."""
        return any(isinstance(cell, str) for row in self.rows for cell in row[1:])

    def by_row(self) -> dict[Cell, dict[str, Cell]]:
        """Cells that are there, by the name of their row and column."""
        return {
            row[0]: {
                name: cell
                for name, cell in zip(self.columns[1:], row[1:], strict=True)
                if cell is not None
            }
            for row in self.rows
        }

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Table":
        """The table that `to_json` gave."""
        lists = {
            "columns": tuple(values["columns"]),
            "rows": tuple(map(tuple, values["rows"])),
            "notes": tuple(values.get("notes", ())),
        }
        return cls(**{**values, **lists})


class RunLog:
    """Prints the phases of a job, each with what it came to and how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def title(self, name: str, detail: str) -> None:
        """The first line."""
        self.console.print()
        self.console.print(Text.assemble((name, "bold"), ("  " + detail, "dim")), soft_wrap=True)
        self.console.print()

    def fact(self, label: str, words: str, seconds: float | None = None) -> None:
        """One line: a label, what is to be said, and perhaps how long it took."""
        taken = f"  {duration(seconds)}" if seconds is not None and seconds >= 1 else ""
        line = Text.assemble((f"  {label:<{LABEL}}", "cyan"), words, (taken, "dim"))
        line.overflow, line.no_wrap = "fold", False
        self.console.print(line, soft_wrap=True)

    def warn(self, words: str) -> None:
        """A line that should not be missed."""
        self.console.print(Text(f"  {words}", style="yellow"), soft_wrap=True)

    @contextmanager
    def phase(self, label: str) -> Iterator[Callable[[str, int, int], None]]:
        """Shows that something is going on; gives a function to report progress to.

        The function takes what is being done, how much is done, and of how much.
        """
        with self.console.status(Text(f"{label} ...", style="dim"), spinner="dots") as status:

            def report(what: str, done: int, total: int) -> None:
                share = f" {done / total:.0%}" if total else ""
                status.update(Text(f"{what} ...{share}", style="dim"))

            yield report

    def table(self, table: Table) -> None:
        """Prints a table: numbers in columns, texts one below another."""
        if table.picture == "matrix" and len(table.rows) > PICTURE:
            return
        direction = {True: "more is better", False: "less is better", None: ""}
        self.heading(
            table.title, table.caption if table.is_text else direction[table.more_is_better]
        )
        if table.is_text:
            self._texts(table)
        else:
            self._numbers(table)
        for note in table.notes:
            self.warn(note)

    def _numbers(self, table: Table) -> None:
        """The last column is the model's own."""
        shown = RichTable(box=None, padding=(0, 3, 0, 0), header_style="dim", pad_edge=False)
        shown.add_column(table.columns[0])
        for column in table.columns[1:]:
            shown.add_column(column, justify="right")
        for name, *cells in table.rows:
            texts = [_shown(cell) for cell in cells]
            shown.add_row(str(name), *texts[:-1], Text(texts[-1], style="bold cyan"))
        self.console.print(Padding(shown, (0, 2)))

    def _texts(self, table: Table) -> None:
        """The first column, such as a prompt, stands before the text and is set off."""
        for number, (prompt, *cells) in enumerate(table.rows):
            if number:
                self.console.print()
            lines = "".join(map(str, cells)).rstrip().split("\n")
            shown = "\n".join(lines[:SAMPLE_LINES]) + "\n ..." * (len(lines) > SAMPLE_LINES)
            text = Text.assemble((str(prompt), "bold cyan"), shown)
            self.console.print(Padding(text, (0, 2, 0, 4)))

    def files(self, path: Path | str, commands: Sequence[tuple[str, str]]) -> None:
        """Lists the files of a run, and the next commands."""
        self.heading(f"Everything is in {path}", "")
        width = max(len(what) for what, _ in commands)
        for what, words in commands:
            line = Text.assemble(f"  {what:<{width}}   ", (words, "dim"))
            self.console.print(line, soft_wrap=True)
        self.console.print()

    def heading(self, words: str, detail: str) -> None:
        """A line over a part of the results."""
        self.console.print()
        self.console.print(Text.assemble((words, "bold"), ("  " + detail, "dim")), soft_wrap=True)


def _shown(cell: Cell) -> str:
    """A cell of a table of numbers: a count as such, other numbers to three decimals."""
    if cell is None:
        return "–"
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._begin


class ByteBar:
    """A live line, or a few plain ones where there is no terminal.

    Use as a context manager round one phase, and call it with the bytes done and all bytes.
    """

    column: type[ProgressColumn] = DownloadColumn  # numbers beside the bar
    words: Callable[[int], str] = staticmethod(decimal)  # for a number, on plain lines

    def __init__(self, what: str, console: Console) -> None:
        """`what` is being done."""
        self._what, self._console = what, console
        self._told = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28, style="grey37", complete_style="cyan"),
            self.column(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> "ByteBar":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows how far the phase is."""
        part = PLAIN_LINES * done // total
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total)
        elif part > self._told:
            self._told = part
            self._console.print(f"{self._what}  {self.words(done)} of {self.words(total)}")


class CountBar(ByteBar):
    """A `ByteBar` of things that are counted."""

    column = MofNCompleteColumn
    words = staticmethod("{:,}".format)


def duration(seconds: float) -> str:
    """Words for a time: `42 s`, `3 min 05 s`, `2 h 10 min`, `4 d 3 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def load_pyplot() -> ModuleType:
    """matplotlib.pyplot, for pictures.

    Raises:
      UserError: it is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise UserError("a picture needs matplotlib: pip install 'lmjax[notebook]'") from None
    return pyplot
