"""Records of test sets: JSON lines, JSON, CSV and TSV, plain or compressed, alone or in an archive.

What a field holds stays what the file says: an answer that looks like a date or a list is text.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.config import UserError
from lmjax.remote import local_copy

FIELD = re.compile(r"\{(\w+)\}")  # of a template
TEXT_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
TFDS = "tfds:"  # before a name and a split of TensorFlow Datasets, as in tfds:ai2_arc/test
CSV_FIELD = 10_000_000  # characters of the longest field


class TextFile(NamedTuple):
    """A file with its text."""

    name: str
    text: str


class Record:
    """One example of a file; tells where a wrong field stands.

    Attributes:
      values: fields by name.
      where: the file and the line, for messages.
      file: name of the file without its folder and ending.
    """

    def __init__(self, values: Mapping[str, Any], where: str, file: str = "") -> None:
        self.values, self.where, self.file = values, where, file

    def text(self, *names: str) -> str:
        """A field that holds text, under the first of these names that is there."""
        value = self.value(*names)
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        if not isinstance(value, str):
            raise self.wrong(names[0], value, "text")
        return value

    def number(self, *names: str) -> int:
        """A field that holds a whole number, perhaps in figures."""
        value = self.value(*names)
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            return int(value)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise self.wrong(names[0], value, "a whole number")
        return int(value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """A field that holds several texts; in a CSV file they stand as a list is written."""
        value = self.value(*names)
        if isinstance(value, str):
            value = _list_of(value)
        if not isinstance(value, Sequence) and not hasattr(value, "tolist"):
            raise self.wrong(names[0], value, "a list of texts")
        found = [item.decode() if isinstance(item, bytes) else item for item in value]
        if not found or not all(isinstance(item, str) for item in found):
            raise self.wrong(names[0], value, "a list of texts")
        return tuple(found)

    def value(self, *names: str) -> Any:
        """The field under the first of these names that is there. UserError: none is."""
        for name in names:
            if name in self.values:
                return self.values[name]
        known = ", ".join(map(str, self.values)) or "none"
        raise UserError(f"{self.where}: there is no field {' or '.join(names)}; fields: {known}")

    def part(self, name: str) -> Record:
        """A field that has fields of its own."""
        value = self.value(name)
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return Record(value, f"{self.where}, {name}", self.file)

    def filled(self, template: str) -> str:
        """A template with the texts of fields in place of their names, as in {question}."""
        return FIELD.sub(lambda field: self.text(field[1]), template)

    def has(self, name: str) -> bool:
        """Returns whether there is a field of that name."""
        return name in self.values

    def index(self, answer: Any, count: int, name: str) -> int:
        """Number of the right option: from a letter (A is the first), or a number from 0.

        Args:
          answer: the field.
          count: number of options.
          name: of the field.
        """
        text = str(answer).strip()
        if len(text) == 1 and text.isalpha():
            number = ord(text.upper()) - ord("A")
        elif text.lstrip("-").isdigit():
            number = int(text)
        else:
            raise self.wrong(name, answer, f"a letter from A on, or a number below {count}")
        if not 0 <= number < count:
            raise self.wrong(name, answer, f"one of the {count} options")
        return number

    def wrong(self, name: str, value: Any, wanted: str) -> UserError:
        """The error for a field that holds something else."""
        return UserError(f"{self.where}: {name} is {str(value)[:60]!r}; it must be {wanted}")


def read_records(path: str) -> list[Record]:
    """All records of a file, an archive, or the files of a folder in the order of their names.

    Args:
      path: also a URL, or tfds:NAME/SPLIT.

    Raises:
      UserError: it cannot be read, or a line is no record.
    """
    if path.startswith(TFDS):
        return _tfds_records(path)
    found = [record for file in read_files(path) for record in _records(file)]
    if not found:
        raise UserError(f"{path} holds no record")
    return found


def read_files(path: str) -> list[TextFile]:
    """Texts of a file, of an archive, or of a folder's files. UserError: it cannot be read."""
    local = local_copy(path, "path")
    try:
        return _read(local)
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read(path: Path) -> list[TextFile]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p.name))
        return [TextFile(str(p), _decoded(_opened(p))) for p in files]
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            members = sorted((m for m in archive if _is_text(m.name)), key=lambda m: m.name)
            return [TextFile(m.name, _decoded(archive.extractfile(m).read())) for m in members]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(filter(_is_text, archive.namelist()))
            return [TextFile(name, _decoded(archive.read(name))) for name in names]
    return [TextFile(str(path), _decoded(_opened(path)))]


def _opened(path: Path) -> bytes:
    readers = {".gz": gzip.open, ".bz2": bz2.open}
    with readers.get(path.suffix, open)(path, "rb") as file:
        return file.read()


def _is_text(name: str) -> bool:
    name = name.removesuffix(".gz").removesuffix(".bz2")
    return name.endswith(TEXT_FILES) and not Path(name).name.startswith(".")


def _decoded(data: bytes) -> str:
    """UTF-8; a file of older programs that is none is Latin-1."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def stem(name: str) -> str:
    """Name of a file without folder and endings."""
    return Path(name).name.split(".")[0]


def _records(file: TextFile) -> Iterator[Record]:
    name = file.name.removesuffix(".gz").removesuffix(".bz2")
    if name.endswith((".csv", ".tsv")):
        yield from _table_records(file)
    elif name.endswith(".json") and _is_one_value(file.text):
        yield from _json_records(file)
    else:
        yield from _line_records(file)


def _is_one_value(text: str) -> bool:
    """Returns whether a .json file is one value; others of that name have an object a line."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        return not isinstance(json.loads(first), Mapping) or len(text.strip().splitlines()) == 1
    except ValueError:
        return True


def _json_records(file: TextFile) -> Iterator[Record]:
    try:
        value = json.loads(file.text)
    except ValueError as error:
        raise UserError(f"{file.name} is damaged: {error}") from None
    if isinstance(value, Mapping):  # the examples stand under one name
        lists = [v for v in value.values() if isinstance(v, list) and v]
        value = lists[0] if len(lists) == 1 else [value]
    for number, record in enumerate(value, 1):
        where = f"{file.name}, record {number}"
        if not isinstance(record, Mapping):
            raise UserError(f"{where} is no object")
        yield Record(record, where, stem(file.name))


def _line_records(file: TextFile) -> Iterator[Record]:
    for number, line in enumerate(file.text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if not isinstance(record, Mapping):
            raise UserError(f"{where} is no object")
        yield Record(record, where, stem(file.name))


def _table_records(file: TextFile) -> Iterator[Record]:
    csv.field_size_limit(CSV_FIELD)
    head = file.text.split("\n", 1)[0]
    delimiter = max("\t,;", key=head.count)
    rows = csv.reader(io.StringIO(file.text, newline=""), delimiter=delimiter)
    names = next(rows, [])
    for row in rows:
        if not row:
            continue
        where = f"{file.name}, line {rows.line_num}"
        if len(row) > len(names):
            raise UserError(f"{where} has {len(row)} fields; the first line names {len(names)}")
        yield Record(dict(zip(names, row)), where, stem(file.name))


def headless_rows(file: TextFile) -> Iterator[tuple[str, list[str]]]:
    """Yields where a row of a CSV file without names stands, and the row."""
    rows = csv.reader(io.StringIO(file.text, newline=""))
    for row in rows:
        if row:
            yield f"{file.name}, line {rows.line_num}", row


def _list_of(text: str) -> Any:
    """A list that is written as Python or JSON writes it; what is none, as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:  # numpy writes no commas between texts
        return ast.literal_eval(text.replace("'\n '", "', '").replace("' '", "', '"))
    except (ValueError, SyntaxError):
        return None


def _tfds_records(path: str) -> list[Record]:
    """Records of a data set of TensorFlow Datasets, which must have been prepared."""
    from lmjax.data.tfds import TFDS as Source

    name, slash, split = path.removeprefix(TFDS).rpartition("/")
    if not slash or not name or not split:
        raise UserError(f"{path}: give tfds:NAME/SPLIT, such as tfds:ai2_arc/test")
    examples = Source(name=name, split=split).examples()
    return [
        Record(_plain(example), f"{path}, example {number}", name)
        for number, example in enumerate(examples)
    ]


def _plain(value: Any) -> Any:
    """Values of TFDS as those of JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value
