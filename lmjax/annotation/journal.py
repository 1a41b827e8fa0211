"""Judgements of one annotator: all of them in order, and files of those that hold."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lmjax.config import UserError
from lmjax.data.json_log import JsonLog, encode_line, encode_lines
from lmjax.files import errors_told, replacing

Task = Literal["rank", "write"]
NAME = "judgements.jsonl"
# Of each task: the event of a judgement, and the file that data sources read.
EVENTS: dict[str, str] = {"rank": "ranked", "write": "written"}
FILES: dict[str, str] = {"rank": "comparisons.jsonl", "write": "conversations.jsonl"}
ANNOTATOR = re.compile(r"\w[\w.-]{0,39}")


class Journal:
    """The folder of one annotator.

    judgements.jsonl has every event: an item was ranked or written, skipped, or the judgement
    before was undone (which leaves that one's line where it is). comparisons.jsonl and
    conversations.jsonl have the lines of the rankings and of the written answers that hold, for
    `Comparisons` and `Conversations`; they are made from the first file again where they differ.

    Attributes:
      path: of judgements.jsonl.
      holding: by task, the judgements and skips that are not undone, in order.
    """

    def __init__(self, folder: Path) -> None:
        """Reads what is there; makes nothing.

        Raises:
          UserError: a file cannot be read, or has a line that is no event.
        """
        self.folder = folder
        self._log = JsonLog(folder / NAME)
        self.path = self._log.path
        self.holding: dict[str, list[dict[str, Any]]] = {task: [] for task in FILES}
        self._behind: set[str] = set()  # tasks whose file of what holds could not be written
        for number, record in enumerate(self._log.records, start=1):
            self._count(record, number)

    @property
    def turn(self) -> int:
        """Number of events so far."""
        return len(self._log.records)

    def last_of(self, task: Task, item: str) -> dict[str, Any] | None:
        """The newest judgement of an item, undone or not."""
        for record in reversed(self._log.records):
            if (record["task"], record["item"], record["event"]) == (task, item, EVENTS[task]):
                return record
        return None

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds an event: `task`, `event`, `item`, and what belongs to it; it is then on disk.

        Raises:
          UserError: it cannot be written.
        """
        self._log.append(record)
        task = record["task"]
        self._count(dict(record), self.turn)
        path = self.folder / FILES[task]
        if record["event"] == "skipped":
            return
        with errors_told(f"the judgement is on disk, but {path} cannot be written"):
            if record["event"] == "undone" or task in self._behind:
                self._write(task)
                return
            self._behind.add(task)
            with path.open("ab") as file:
                file.write(encode_line(record))
            self._behind.discard(task)

    def complete(self) -> None:
        """Writes the files of what holds anew where a kill has left them behind.

        Raises:
          UserError: one cannot be read or written.
        """
        for task, name in FILES.items():
            path = self.folder / name
            with errors_told(f"cannot write {path}"):
                there = path.read_bytes() if path.is_file() else b""
                if there != encode_lines(self._judged(task)):
                    self._write(task)

    def _judged(self, task: str) -> list[dict[str, Any]]:
        return [record for record in self.holding[task] if record["event"] == EVENTS[task]]

    def _write(self, task: str) -> None:
        self._behind.add(task)
        path, judged = self.folder / FILES[task], self._judged(task)
        if judged:
            with replacing(path) as unfinished:
                unfinished.write_bytes(encode_lines(judged))
        else:
            path.unlink(missing_ok=True)  # an empty file would be refused as data
        self._behind.discard(task)

    def _count(self, record: dict[str, Any], number: int) -> None:
        """Adds to `holding`, or takes away."""
        task, event = record.get("task"), record.get("event")
        if task not in FILES or event not in (EVENTS[task], "skipped", "undone"):
            raise UserError(f"{self.path}, line {number}: no event of an annotation")
        if event != "undone":
            self.holding[task].append(record)
        elif self.holding[task]:
            self.holding[task].pop()


def annotator_name(given: str) -> str:
    """An annotator's name as folders and records have it: in small letters.

    Raises:
      UserError: it is none.
    """
    name = unicodedata.normalize("NFC", given.strip().casefold())
    if not ANNOTATOR.fullmatch(name):
        raise UserError(
            f"annotator={given[:60]!r}: a name has 1 to 40 letters, digits, _, . and -, and begins"
            " with a letter or a digit"
        )
    return name


def read_journals(folder: Path) -> dict[str, Journal]:
    """Reads the journals of all annotators, by their names.

    Raises:
      UserError: the folder cannot be read, or one of its files.
    """
    with errors_told(f"cannot read {folder}"):
        found = sorted(path.parent for path in folder.glob(f"*/{NAME}"))
    return {path.name: Journal(path) for path in found}
