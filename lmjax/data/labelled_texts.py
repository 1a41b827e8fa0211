"""Texts with labels, or pairs of texts, from JSON lines and from tables."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from lmjax.config import UserError, config, replace
from lmjax.data.documents import BadRecord, Document, OnSkip, Part
from lmjax.data.files import DamagedFile, file_parts, find_files, open_file, read_blocks
from lmjax.data.sources import JsonRecords
from lmjax.data.spans import SpanKind
from lmjax.data.tokenizers import Tokenizer

SHOWN = 12  # labels that a message names


@config
class LabelledTexts(JsonRecords):
    """Texts with a label each, in JSON lines, compressed or not.

    A label is the name of a class, or a whole number: among names that are all numbers it is one of
    these, otherwise it counts the names from 0. With kind=number it is a number to be predicted.

    Each text is a group of one document (data.rows=groups): its labels are 0, the number in its
    group, and the number of its class among `labels`, or the number. The tokens of a pair are those
    of both texts, with what closes a document between them ([SEP] of a BERT).
    """

    text: str = "text"  # the field with the text
    second: str = ""  # the field with the second text of a pair; empty: there are no pairs
    label: str = "label"  # the field with the label
    kind: Literal["class", "number"] = "class"  # what labels are
    # Names of the classes, the first of number 0; none: those that the files have, sorted.
    labels: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raises UserError for names that cannot be meant."""
        super().validate()
        fields = [self.text, self.label, *([self.second] if self.second else [])]
        if "" in fields or len(set(fields)) < len(fields):
            raise UserError(
                f"text={self.text!r}, second={self.second!r}, label={self.label!r}: give different"
                " names of fields"
            )
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels={self.labels}: give each name once")
        if self.labels and self.kind == "number":
            raise UserError(f"kind=number has no names of classes; given are labels={self.labels}")

    def names(self) -> tuple[str, ...]:
        """Names of the classes: `labels`, or those that are found by reading all files.

        They are sorted as texts, or as numbers where all of them are whole numbers.

        Raises:
          UserError: a line cannot be read, and the source says to stop there; or there is no label.
        """
        if self.labels or self.kind == "number":
            return self.labels
        found = set()
        for part in self.parts():
            lines = self.lines(part, lambda message: None, lambda record, _: (self._name(record),))
            found |= {name for names in lines for name in names}
        if not found:
            raise UserError(f"there is no text with a label in {self.path}")
        return sorted_names(found)

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`; where `labels` are not given all files are read for them first."""
        if self.kind == "class" and not self.labels:
            return replace(self, labels=self.names()).read(part, on_skip)
        return super().read(part, on_skip)

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`; lines without a text are left out."""
        text = self._text(record, self.text)
        second = self._text(record, self.second) if self.second else None
        value = self._number(record) if self.kind == "number" else self._class(record)
        if not text.strip() or (second is not None and not second.strip()):
            return
        document = Document(
            text, identity, metadata=self.metadata_of(record), labels=(0.0, float(value))
        )
        if second is not None:
            encode = functools.partial(_encode_pair, first=text, second=second)
            document = document._replace(text=f"{text}\n{second}", encode=encode)
        yield document

    def _number(self, record: dict[str, Any]) -> float:
        value = self._label(record)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise BadRecord(f"field {self.label!r} is {value!r}, not a number")
        return number

    def _class(self, record: dict[str, Any]) -> int:
        return class_number(self._name(record), self.labels, self.label)

    def _name(self, record: dict[str, Any]) -> str:
        """Name of a line's class, which may be written as a number."""
        value = self._label(record)
        if (name := class_name(value)) is None:
            raise BadRecord(
                f"field {self.label!r} is {value!r}: a class is a name or a whole number"
                " (kind=number for numbers that are predicted)"
            )
        return name

    def _label(self, record: dict[str, Any]) -> Any:
        if self.label not in record:
            names = ", ".join(map(repr, list(record)[:SHOWN])) or "none"
            raise BadRecord(f"there is no field {self.label!r}; the fields are {names}")
        return record[self.label]


@config
class LabelledTable(LabelledTexts):
    """Texts with a label each, in tables (CSV, TSV), compressed or not.

    Fields between commas or semicolons may be in double quotes, and then hold line ends; between
    tabs quotes are text.
    """

    delimiter: Literal[",", ";", "tab"] = ","  # character between two fields
    columns: tuple[str, ...] = ()  # names of the fields; none: those that the first line gives

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`: a file each."""
        return file_parts(find_files(self.path), divide=False)

    def lines(
        self, part: Part, on_skip: OnSkip, use: Callable[[dict[str, Any], str], Iterable[Any]]
    ) -> Iterator[tuple[Any, ...]]:
        """See `JsonRecords.lines`."""
        if (text := whole_text(part, self.on_error, on_skip)) is None:
            return
        style = {"delimiter": self.delimiter, "strict": True}
        if self.delimiter == "tab":
            style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        rows = csv.reader(io.StringIO(text, newline=""), **style)
        columns = self.columns
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
                if row is None:
                    return
                if not columns:
                    columns = tuple(row)
                    continue
                if not row:
                    continue
                if len(row) != len(columns):
                    raise BadRecord(f"there are {len(row)} fields for {len(columns)} columns")
                found = tuple(use(dict(zip(columns, row, strict=True)), f"{part.name}:{line}"))
            except (BadRecord, csv.Error) as error:
                self._leave_out(part, line, error, on_skip)
                continue
            yield found


def whole_text(part: Part, on_error: str, on_skip: OnSkip) -> str | None:
    """Text of a file; None where it cannot be read, and the source says to go on."""
    try:
        with open_file(part.name) as file:
            return b"".join(read_blocks(file, part.name)).decode("utf-8-sig")
    except DamagedFile as error:
        message = str(error)
    except UnicodeDecodeError as error:
        message = f"{part.name} is not UTF-8 at byte {error.start} ({error.reason})"
    if on_error == "raise":
        raise UserError(message)
    on_skip(f"{message}; all of it is left out")
    return None


def class_name(value: Any) -> str | None:
    """Name of a class, which may be written as a number; None for what can be none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int) and str(value) else None


def class_number(name: str, names: Sequence[str], field: str) -> int:
    """Number of a class among names; where these are no numbers, a whole number counts them from 0.

    Raises:
      BadRecord: there is no such class in this field.
    """
    if name in names:
        return names.index(name)
    if _is_whole(name) and not any(map(_is_whole, names)):
        if 0 <= int(name) < len(names):
            return int(name)
        raise BadRecord(f"field {field!r} is {name}; there are {len(names)} labels, counted from 0")
    known = ", ".join(map(repr, names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise BadRecord(f"field {field!r} is {name!r}; the labels are {known}{more}")


def common_names(sources: Sequence[LabelledTexts]) -> tuple[str, ...]:
    """Names of the classes of several sources: those that some give, or all that are found.

    Raises:
      UserError: two give different ones, or a source cannot be read.
    """
    given = dict.fromkeys(source.labels for source in sources if source.labels)
    if len(given) > 1:
        one, other, *_ = given
        raise UserError(f"the sources have different labels: {one} and {other}")
    return next(iter(given), ()) or sorted_names({n for source in sources for n in source.names()})


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Names of classes in order, as texts, or as numbers where all of them are whole numbers."""
    return tuple(sorted(names, key=int if all(map(_is_whole, names)) else str))


def _is_whole(name: str) -> bool:
    """Returns whether a name is a whole number."""
    return name.removeprefix("-").isdecimal()


def _encode_pair(
    tokenizer: Tokenizer, first: str, second: str
) -> tuple[list[int], list[tuple[int, int, SpanKind]]]:
    """See `Document.encode`: both texts, the second one with what closes it as a span."""
    between = tokenizer.closing or (tokenizer.end,)
    before = [*tokenizer.opening, *tokenizer.encode(first), *between]
    tokens = [*before, *tokenizer.encode(second), *tokenizer.closing]
    return tokens, [(len(before), len(tokens), "second")]
