"""Documents from files: text in many layouts, and JSON lines."""

import abc
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from lmjax.config import UserError, config
from lmjax.data.documents import BadRecord, Document, HashFiles, OnSkip, Part, Source, digest
from lmjax.data.file_source import check_longest, check_paths, settings_digest, too_long
from lmjax.data.files import (
    BLANK_LINE,
    BYTE_ORDER_MARK,
    LINE_BREAK,
    DamagedFile,
    FilePiece,
    file_parts,
    find_files,
    line_number,
    open_file,
    read_blocks,
    read_pieces,
    text_separator,
)
from lmjax.data.hashes import FileHashes
from lmjax.data.spans import Span

JSON_LINE = re.compile(rb"\n")  # a carriage return is white space for JSON; this is found faster
ADDED_LATER = ("metadata", "longest", "grades")  # settings that came when there were runs already
BLANK_LINES = re.compile(rb"(?:[ \t]*\r?\n)*")  # more of them, before a paragraph


@config
class TextFiles(Source):
    """Plain UTF-8 text files, compressed or not (.gz, .bz2, .xz, .zst).

    Reading a .zst file takes as much memory as its window: up to 2 GiB after `zstd --long=31`.
    """

    path: str | tuple[str, ...]  # path, URL or glob pattern, or several: "books/**/*.txt"
    # What is a document: a file, a line, a paragraph (blank lines between), or what stands between
    # two `separator`s.
    split: Literal["file", "line", "paragraph", "separator"] = "file"
    separator: str = "<|endoftext|>"  # text between two documents, for split=separator
    span: tuple[float, float] = (0.0, 1.0)  # the stretch of each file to take: (0.0, 0.9)
    # What to do about bytes that are no UTF-8: stop, leave the document out, or put U+FFFD there.
    on_error: Literal["raise", "skip", "replace"] = "raise"
    # bytes of a document; longer ones are left out and counted, and never held; None: all are taken
    longest: int | None = None

    def validate(self) -> None:
        check_paths(self.path)
        check_longest(self.longest)
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise UserError(f"span is {self.span}; it must be two rising numbers from 0 to 1")
        if self.split != "file" and self.span != (0.0, 1.0):
            raise UserError(f"span is for split=file, where a file is one text; got {self.split}")
        if not self.separator:
            raise UserError("separator is empty; give the text that stands between two documents")

    def parts(self) -> tuple[Part, ...]:
        return file_parts(find_files(self.path), divide=self.split == "line")

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`: what the files hold in their order, wherever they lie."""
        hashes = (hash_files or FileHashes())(find_files(self.path))
        return digest(settings_digest(self, ADDED_LATER), *hashes)

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        try:
            for piece in self._pieces(part):
                if piece.left_out:
                    on_skip(too_long(f"{part.name}:{piece.offset}", piece.left_out))
                    continue
                if self.split == "paragraph":
                    begin = BLANK_LINES.match(piece.data).end()
                    piece = FilePiece(piece.data[begin:], piece.offset + begin, piece.number)
                text = self._decode(part, piece, on_skip)
                if text and not text.isspace():
                    yield Document(text, f"{part.name}:{piece.offset}")
        except DamagedFile as error:
            if self.on_error != "skip":
                raise UserError(str(error)) from None
            on_skip(f"{error}; {'all' if self.split == 'file' else 'the rest'} of it is left out")

    def _pieces(self, part: Part) -> Iterator[FilePiece]:
        if self.split != "file":
            separators = {"line": LINE_BREAK, "paragraph": BLANK_LINE}
            separator = separators.get(self.split) or text_separator(self.separator.encode())
            yield from read_pieces(part, separator, self.longest)
            return
        blocks, size = [], 0
        with open_file(part.name) as file:
            for block in read_blocks(file, part.name):
                size += len(block)
                if self.longest is not None and size > self.longest:
                    yield FilePiece(b"", 0, 0, size)
                    return
                blocks.append(block)
        data = b"".join(blocks)
        mark = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
        yield FilePiece(data[mark:], mark, 0)

    def _decode(self, part: Part, piece: FilePiece, on_skip: OnSkip) -> str:
        errors = "replace" if self.on_error == "replace" else "strict"
        try:
            text = piece.data.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            message = _not_utf8(part.name, piece, error)
            if self.on_error == "raise":
                raise UserError(
                    f"{message}; convert the file, or set on_error=skip or on_error=replace"
                ) from None
            on_skip(message)
            return ""
        if self.span == (0.0, 1.0):
            return text
        first, last = (int(len(text) * edge) for edge in self.span)
        return text[first:last]


@config
class JsonRecords(Source):
    """Base of the sources that read files with a JSON object a line, compressed or not."""

    path: str | tuple[str, ...]  # path, URL or glob pattern, or several: "corpus/*.jsonl.zst"
    on_error: Literal["raise", "skip"] = "raise"  # what to do about a line that is not as it should
    # Fields that are kept beside the tokens, where a line has them: ("url", "licence").
    metadata: tuple[str, ...] = ()
    # bytes of a line; longer ones are left out and counted, and never held; None: all are taken
    longest: int | None = None

    def validate(self) -> None:
        """Raises UserError for a path that cannot be served, or metadata named twice."""
        check_paths(self.path)
        check_longest(self.longest)
        if "" in self.metadata or len(set(self.metadata)) < len(self.metadata):
            raise UserError(f"metadata={self.metadata}: give each field's name, once")

    def parts(self) -> tuple[Part, ...]:
        return file_parts(find_files(self.path), divide=True)

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`: what the files hold in their order, wherever they lie."""
        hashes = (hash_files or FileHashes())(find_files(self.path))
        return digest(settings_digest(self, ADDED_LATER), *hashes)

    @abc.abstractmethod
    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """The documents of a line.

        Args:
          record: the JSON object.
          identity: of the documents.

        Raises:
          BadRecord: it has not what it should have.
        """

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        for documents in self.lines(part, on_skip, self.documents_of):
            yield from documents

    def records(self, part: Part, on_skip: OnSkip) -> Iterator[dict[str, Any]]:
        """The JSON objects of a part; see `read`."""
        for records in self.lines(part, on_skip, lambda record, _: (record,)):
            yield from records

    def lines(
        self, part: Part, on_skip: OnSkip, use: Callable[[dict[str, Any], str], Iterable[Any]]
    ) -> Iterator[tuple[Any, ...]]:
        """Results of `use` for each line, all of them or none.

        Args:
          part: of the source.
          on_skip: is told about each line that is left out.
          use: JSON object, identity -> results; its BadRecord becomes a message with the line.

        Raises:
          UserError: a line that `use` refuses, where the source says to stop there.
        """
        try:
            for piece in read_pieces(part, JSON_LINE, self.longest):
                if piece.left_out:
                    on_skip(too_long(f"{part.name}:{piece.offset}", piece.left_out))
                    continue
                if not piece.data.strip():
                    continue
                try:
                    record = self._object(part, piece)
                    found = tuple(use(record, f"{part.name}:{piece.offset}"))
                except BadRecord as error:
                    self._leave_out(part, line_number(part, piece), error, on_skip)
                    continue
                yield found
        except DamagedFile as error:
            if self.on_error == "raise":
                raise UserError(str(error)) from None
            on_skip(f"{error}; the rest of it is left out")

    def _leave_out(self, part: Part, line: int, error: BadRecord, on_skip: OnSkip) -> None:
        """Tells that a line is left out; UserError where the source says to stop there."""
        message = f"{part.name}, line {line}: {error}"
        if self.on_error == "raise":
            raise UserError(
                f"{message}\n(on_error=skip leaves such lines out and counts them)"
            ) from None
        on_skip(message)

    def metadata_of(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Fields that are kept of a line beside its text; None for none."""
        return {name: record[name] for name in self.metadata if name in record} or None

    def _object(self, part: Part, piece: FilePiece) -> dict[str, Any]:
        try:
            value = json.loads(piece.data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadRecord(_not_utf8(part.name, piece, error)) from None
        except (ValueError, RecursionError) as error:
            start = piece.data[:60].decode("utf-8", "replace")
            raise BadRecord(f"not JSON ({error}): {start!r}") from None
        if not isinstance(value, dict):
            raise BadRecord(f"expected a JSON object, got {type(value).__name__}")
        return value

    def _text(self, value: dict[str, Any], field: str) -> str:
        if field not in value:
            names = ", ".join(map(repr, list(value)[:12])) or "none"
            raise BadRecord(f"there is no field {field!r}; the fields are {names}")
        text = value[field]
        if not isinstance(text, str):
            raise BadRecord(f"field {field!r} is {type(text).__name__}, not text")
        try:
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord(f"field {field!r} holds half a surrogate pair") from None
        return text


@config
class JsonLines(JsonRecords):
    """Files with a JSON object a line, one field of which is the text; compressed or not."""

    field: str = "text"  # the field with the text

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        if text := self._text(record, self.field):
            yield Document(text, identity, metadata=self.metadata_of(record))


@config
class JsonPrompts(JsonLines):
    """JSON lines with a prompt and its answer, which is what BlankInfilling(answers=...) predicts.

    The answer's place is where the prompt has the mask, or else its end. A space before that place
    belongs to the answer, as it does when a model fills in a prompt. Lines with an empty prompt or
    answer are left out. Lines with the same prompt stand on the same side of the held-out split.
    Other objectives take the tokens around the answer for text; a run says so when it begins.
    """

    field: str = "prompt"  # the field with the prompt
    answer: str = "answer"  # the field with the answer
    mask: str = "[MASK]"  # special token for the answer, and how the prompt writes it
    closing: str = "<|endofpiece|>"  # special token behind the answer: the objective's eop

    def validate(self) -> None:
        """Raises UserError for names that cannot be told apart."""
        super().validate()
        for one, other in (("field", "answer"), ("mask", "closing")):
            names = getattr(self, one), getattr(self, other)
            if "" in names or names[0] == names[1]:
                raise UserError(
                    f"{one}={names[0]!r}, {other}={names[1]!r}: give two different names"
                )

    def documents_of(self, record: dict[str, Any], identity: str) -> Iterator[Document]:
        """See `JsonRecords.documents_of`."""
        prompt, answer = self._text(record, self.field), self._text(record, self.answer)
        if not prompt or not answer:
            return
        before, *after = prompt.split(self.mask)
        if len(after) > 1:
            raise BadRecord(
                f"field {self.field!r} has {self.mask} {len(after)} times; the one answer has one "
                "place, or none for the prompt's end"
            )
        if before.endswith(" "):
            before, answer = before[:-1], " " + answer
        first, end = len(before), len(before) + len(answer)
        yield Document(
            text="".join([before, answer, *after]),
            identity=identity,
            group=prompt,
            spans=(Span(first, end, "answer", self.mask, self.closing),),
            metadata=self.metadata_of(record),
        )


def _not_utf8(name: str, piece: FilePiece, error: UnicodeDecodeError) -> str:
    return (
        f"{name} is not UTF-8: byte 0x{piece.data[error.start]:02x} at offset "
        f"{piece.offset + error.start} ({error.reason})"
    )
