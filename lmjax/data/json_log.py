"""Files of JSON lines that grow by one line at a time, each of which is on disk at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmjax.config import UserError
from lmjax.files import errors_told


class JsonLog:
    """A file of JSON objects, one a line, that is only ever added to.

    A line that a kill or a full disk left unfinished was never acknowledged: it does not count, and
    is cut off before the next line is added. One process at a time may add to a file.

    Attributes:
      path: of the file, which is made with its first line.
      records: the objects of all lines.
    """

    def __init__(self, path: Path) -> None:
        """Reads the lines that are there.

        Raises:
          UserError: a line is no JSON object, or the file cannot be read.
        """
        self.path = path
        data = b""
        with errors_told(f"cannot read {path}"), suppress(FileNotFoundError):
            data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        self.records = [_read(path, number, line) for number, line in enumerate(lines, start=1)]
        self._end, self._size = len(whole), len(data)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; it is on disk when this returns, or not there at all.

        Raises:
          UserError: it cannot be written, or another program has changed the file.
        """
        line = encode_line(record)
        with errors_told(f"cannot write {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._add(file, line)
            finally:
                os.close(file)
            if not self.records:
                _sync_folder(self.path.parent)
        self.records.append(dict(record))

    def _add(self, file: int, line: bytes) -> None:
        if os.fstat(file).st_size != self._size:
            raise UserError(
                f"{self.path} was changed by another program while it was in use: nothing is"
                " written; start again"
            )
        try:
            os.ftruncate(file, self._end)
            left = memoryview(line)
            while left:  # a disk that fills up takes a part of it first
                left = left[os.write(file, left) :]
            os.fsync(file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, self._end)
            self._size = os.fstat(file).st_size
            raise
        self._end += len(line)
        self._size = self._end


def encode_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON as a file has it."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def encode_lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Lines of JSON as a file has them."""
    return b"".join(map(encode_line, records))


def _read(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number}: not a JSON object: {line[:60]!r}")
    return record


def _sync_folder(folder: Path) -> None:
    """Sees that the names of new files, and of the folder itself, are on disk."""
    for path in (folder, folder.parent):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
