"""Archives of the web: WARC with pages, WET with their text, as Common Crawl publishes them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Literal

from lmjax.config import UserError, config
from lmjax.data.documents import Document, OnSkip, Part
from lmjax.data.encodings import decode_page
from lmjax.data.file_source import EXTRA, FileSource, too_long
from lmjax.data.files import BLOCK, DAMAGED, find_files, open_file, read_blocks
from lmjax.files import reason

ENDINGS = (".warc", ".warc.gz", ".warc.zst", ".wet", ".wet.gz", ".wet.zst")
HEAD = 1 << 16  # bytes of a record in which the headers of an answer end
PAGES = ("text/html", "application/xhtml+xml")


@config
class WebArchives(FileSource):
    """Archives of the web: pages of WARC files, texts of WET files (ISO 28500).

    The text of a document is the page's markup (see the step `MainText`), or the extracted text.
    Of each record the URL and the date are kept. A record that is cut short is left out and told,
    like the rest of a damaged file; a file that was cut between two records cannot be told from a
    whole one.
    """

    path: str | tuple[str, ...] = ()  # files, folders or patterns; URLs of a bucket too
    # a list of archives, a path a line, such as Common Crawl's warc.paths.gz
    segments: str | None = None
    root: str = ""  # before each path of `segments`: "s3://commoncrawl/"
    records: Literal["pages", "texts", "all"] = "all"  # pages are of WARC, texts of WET

    def validate(self) -> None:
        """Raises UserError for archives that are named nowhere."""
        super().validate()
        if not self.path and self.segments is None:
            raise UserError("path or segments: give archives, or a list of them")

    def endings(self) -> tuple[str, ...]:
        """See `FileSource.endings`."""
        return ENDINGS

    def files(self) -> tuple[str, ...]:
        """See `FileSource.files`."""
        named = super().files() if self.path else ()
        if self.segments is None:
            return named
        with open_file(self.segments) as file:
            lines = b"".join(read_blocks(file, self.segments)).decode("utf-8").split()
        if not lines:
            raise UserError(f"segments={self.segments}: the list is empty")
        return (*named, *find_files(tuple(self.root + line for line in lines)))

    def documents_of(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `FileSource.documents_of`."""
        library = _library(part.name)
        wanted = library.WarcRecordType.no_type
        if self.records != "texts":
            wanted |= library.WarcRecordType.response | library.WarcRecordType.resource
        if self.records != "pages":
            wanted |= library.WarcRecordType.conversion
        with _Stream(part.name) as stream:
            try:
                for record in library.ArchiveIterator(stream, wanted, parse_http=False):
                    length, at = record.content_length, f"{part.name}:{record.stream_pos}"
                    if self.longest is not None and length > self.longest:
                        if _may_be_document(library, record):
                            on_skip(too_long(at, length))
                        continue
                    block = record.reader.read()
                    if len(block) < length:
                        message = f"{at}: the record has {len(block)} bytes in place of {length}"
                        self.refuse(message, on_skip)
                        continue
                    try:
                        document = _document(library, record, block, part.name, self.longest)
                    except _TooLong as error:
                        on_skip(too_long(at, error.size))
                        continue
                    if document is not None:
                        yield document
            except OSError as error:
                if stream.failure is None:
                    self.refuse(f"{part.name}: {error}; the rest of it is left out", on_skip)
        if stream.failure is None and stream.last not in (b"", b"\n"):
            stream.failure = f"{part.name} ends in the middle of a record"
        if stream.failure is not None:
            self.refuse(f"{stream.failure}; the rest of it is left out", on_skip)


def _library(name: str) -> Any:
    """The library fastwarc. UserError: it is not installed."""
    try:
        import fastwarc
    except ImportError:
        raise UserError(f"{name}: archives of the web are read by fastwarc: {EXTRA}") from None
    return fastwarc


class _Stream:
    """Decompressed bytes of an archive for the library, which takes damage for the end.

    Attributes:
        failure: a message about the damage; None: there was none.
        last: the last byte that was read.
    """

    def __init__(self, name: str) -> None:
        self._name, self.failure, self.last = name, None, b""
        self._file: io.BufferedIOBase = open_file(name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        """Some bytes; none at the end, or from damage on."""
        try:
            data = b"" if self.failure else self._file.read(size)
            self.last = data[-1:] or self.last
            return data
        except DAMAGED as error:
            self.failure = f"{self._name} is damaged or cut short: {error}"
        except OSError as error:
            raise UserError(f"cannot read {self._name}: {reason(error)}") from error
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Refused: the library reads from beginning to end."""
        raise OSError("an archive is read from its beginning to its end")

    def tell(self) -> int:
        """Bytes that were read."""
        return self._file.tell()

    def close(self) -> None:
        """Nothing: the block that opened the stream closes it."""


class _TooLong(Exception):
    """A page that is longer than its record, of so many bytes or more."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def _document(
    library: Any, record: Any, block: bytes, name: str, longest: int | None
) -> Document | None:
    """The page or text of a record; None where it is neither.

    Raises:
        _TooLong: the page was sent compressed, and has more bytes than `longest`.
    """
    headers = record.headers
    url, at = headers.get("WARC-Target-URI") or "", f"{name}:{record.stream_pos}"
    about = {"url": url.strip("<>"), "date": headers.get("WARC-Date") or "", "file": name}
    if record.record_type == library.WarcRecordType.conversion:
        text = block.decode("utf-8", "replace")
    else:
        kind, server, body = (headers.get("Content-Type") or "", None, block)
        if record.is_http:
            answer = _answer(library, block)
            if answer is None or answer.http_headers.status_code not in (200, None):
                return None
            kind, server = answer.http_content_type or "", answer.http_charset
        if not kind.lower().startswith(PAGES):
            return None
        if record.is_http:
            body = _body(answer, longest)
        text = decode_page(body, server)
    return Document(text, at, metadata=about) if text and not text.isspace() else None


def _body(answer: Any, longest: int | None) -> bytes:
    """The body of an answer. _TooLong: it has more bytes than that."""
    if longest is None:
        return answer.reader.read()
    blocks, size = [], 0
    while block := answer.reader.read(BLOCK):
        size += len(block)
        if size > longest:
            raise _TooLong(size)
        blocks.append(block)
    return b"".join(blocks)


def _may_be_document(library: Any, record: Any) -> bool:
    """Returns whether a record that is not read would have been a text or a page, by its head."""
    if record.record_type == library.WarcRecordType.conversion:
        return True
    kind = record.headers.get("Content-Type") or ""
    if record.is_http:
        answer = _answer(library, record.reader.read(HEAD))
        if answer is None or answer.http_headers.status_code not in (200, None):
            return False
        kind = answer.http_content_type or ""
    return kind.lower().startswith(PAGES)


def _answer(library: Any, block: bytes) -> Any | None:
    """The answer of a server, without the encodings of its transfer; None where it is none.

    Crawlers store bodies decoded and leave the headers as they were: where decoding fails, the
    body is taken as it is.
    """
    for decode in ("all", "none"):
        answer = library.WarcRecord()
        answer.set_bytes_content(block)
        answer.is_http = True
        try:
            answer.parse_http(auto_decode=decode, strict_mode=False)
        except OSError:
            continue
        return answer
    return None
