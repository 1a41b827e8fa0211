"""Reading files in pieces: compressed or not, by separator, with the place of what is wrong."""

import bz2
import glob
import gzip
import io
import itertools
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lmjax.config import UserError
from lmjax.data.documents import Part
from lmjax.files import errors_told, reason
from lmjax.remote import find_urls, is_url, open_url, url_is_folder, url_state

BLOCK = 1 << 20  # bytes read at a time
PACKED = 1 << 16  # compressed ones
RANGE = 4 << 20  # bytes of an uncompressed file that make one part
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TAIL = 1 << 16  # bytes of a long piece that are looked through again, for a separator
AHEAD = 4  # bytes behind a separator that decide where it ends: up to two line breaks
LARGEST_WINDOW = 1 << 31  # bytes that a .zst file may refer back to: zstd's own limit, --long=31
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


class FilePiece(NamedTuple):
    """Bytes between two separators."""

    data: bytes
    offset: int  # of the first byte, in the (decompressed) file
    number: int  # of the piece, from 0 where reading began
    left_out: int = 0  # bytes of a piece that is too long, whose data are not here


class Found(NamedTuple):
    """Borders of a separator, called as those of a match of a regular expression."""

    first: int
    last: int

    def start(self) -> int:
        """Its first byte."""
        return self.first

    def end(self) -> int:
        """The byte behind it."""
        return self.last


class Separator:
    """A regular expression for what stands between two pieces, with a line break before it or not.

    It finds what one expression for both would, but a search for what begins with a fixed text is
    many times as fast.
    """

    def __init__(self, pattern: bytes, before: tuple[bytes, ...]) -> None:
        """
        Args:
            pattern: begins with a text, which is in no text of `before`, or at most ends it.
            before: texts of which the first that stands before a match belongs to it.
        """
        self._pattern, self._before = re.compile(pattern), before

    def finditer(self, data: bytes) -> Iterator[Found]:
        """Its borders wherever it stands in some bytes, from left to right."""
        last = 0
        for match in self._pattern.finditer(data):
            first, end = match.span()
            for mark in self._before:
                if data.endswith(mark, last, first):
                    first -= len(mark)
                    break
            yield Found(first, end)
            last = end


def text_separator(text: bytes) -> Separator:
    """The separator that is a text, with a line break before it and one behind it, or none."""
    pattern = re.escape(text) + rb"(?:\r?\n)?"
    if text.startswith((b"\r", b"\n")):  # with a line break before it, it may begin in there
        return Separator(rb"(?:\r?\n)?" + pattern, ())
    return Separator(pattern, (b"\r\n", b"\n"))


LINE_BREAK = Separator(rb"\n", (b"\r",))
BLANK_LINE = Separator(rb"\n[ \t]*\r?\n", (b"\r",))


class DamagedFile(Exception):
    """A compressed file that ends early or is not what its name says."""


def find_files(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    """The files that the path patterns name, each once, sorted within a pattern.

    A folder that links lead to again is the same folder. A URL is looked for in its store.

    Raises:
        UserError: a pattern matches no file, or names a folder.
    """
    found: dict[str, str] = {}  # by where it really lies
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if is_url(pattern):
            found |= {url: url for url in _find_objects(pattern)}
            continue
        wanted = os.path.expanduser(pattern)
        matches = [wanted] if os.path.exists(wanted) else glob.glob(wanted, recursive=True)
        files = [match for match in matches if _is_file(match)]
        if not files and os.path.isdir(wanted):
            raise UserError(
                f"{pattern!r} is a folder; name the files in it, as in "
                f"{os.path.join(pattern, '**', '*.txt')!r}"
            )
        if not files:
            raise UserError(f"no file matches {pattern!r} (looked from {os.getcwd()})")
        shortest: dict[str, str] = {}
        for name in sorted(files, key=len):
            folder, last = os.path.split(name)
            shortest.setdefault(os.path.join(os.path.realpath(folder), last), name)
        for path, name in sorted(shortest.items(), key=lambda item: item[1]):
            found.setdefault(path, name)
    if not found:
        raise UserError("the source names no file: its path is empty")
    return tuple(found.values())


def _find_objects(pattern: str) -> list[str]:
    """The URLs of the objects that a URL with or without `*` names; UserError: see `find_files`."""
    with errors_told("cannot read the text"):
        if found := find_urls(pattern, "path"):
            return found
        if url_is_folder(pattern):
            raise UserError(
                f"{pattern!r} is a folder; name the objects in it, as in "
                f"{pattern.rstrip('/') + '/**/*.txt'!r}"
            )
    raise UserError(f"no object matches {pattern!r}")


def open_bytes(name: str) -> io.BufferedIOBase | io.RawIOBase:
    """A file or an object as it is, to read bytes of. OSError: it cannot be opened."""
    return open_url(name) if is_url(name) else open(name, "rb", buffering=0)


def _is_file(path: str) -> bool:
    """Like `os.path.isfile`, but for one that cannot be looked at, which must not be left out."""
    with errors_told("cannot read the text"):
        return stat.S_ISREG(os.stat(path).st_mode)


def file_parts(files: tuple[str, ...], divide: bool) -> tuple[Part, ...]:
    """Parts for files: each whole, or in ranges of bytes where `divide` and it is uncompressed.

    Raises:
        UserError: all files are empty.
    """
    parts = []
    for name in files:
        with errors_told("cannot read the text"):
            size = url_state(name)[0] if is_url(name) else os.path.getsize(name)
        step = RANGE if divide and not name.endswith(COMPRESSED) else max(size, 1)
        for start in range(0, size, step):
            stop = min(start + step, size)
            parts.append(Part(name, start, stop, stop - start))
    if not parts:
        which = files[0] if len(files) == 1 else f"all of {len(files)} files ({files[0]}, ...)"
        raise UserError(f"there is no text: empty is {which}")
    return tuple(parts)


def open_file(name: str) -> io.BufferedIOBase:
    """Opens a file for reading bytes, decompressed if its name ends with .gz, .bz2, .xz or .zst.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if name.endswith(".gz"):
            return gzip.open(open_url(name) if is_url(name) else name)
        if name.endswith(COMPRESSED):
            return io.BufferedReader(_Decompressed(name, *_streams(name)), BLOCK)
        return open_url(name) if is_url(name) else open(name, "rb")
    except OSError as error:
        raise UserError(f"cannot open {name}: {error.strerror or error}") from None


def _streams(name: str) -> tuple[Callable[[], Any], type[Exception], bytes]:
    """Decompressor of one stream of a file, its error for damage, and bytes allowed after it.

    Raises:
        UserError: the package for .zst is missing.
    """
    if name.endswith(".bz2"):
        return bz2.BZ2Decompressor, OSError, b""
    if name.endswith(".xz"):
        return lzma.LZMADecompressor, lzma.LZMAError, b"\0"
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{name} needs the zstandard package: pip install 'lmjax[zstd]'") from None
    unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    return unpacker.decompressobj, zstandard.ZstdError, b""


class _Decompressed(io.RawIOBase):
    """Decompressed bytes of a file; unlike the libraries' own readers, it notices what is missing.

    Those take the damaged beginning of a further stream for the end of the text (bz2, lzma), or do
    not look for an end at all (zstandard). A .zst file keeps as many bytes in memory as its window
    is long: 8 MiB mostly, up to 128 MiB after `zstd --ultra -22`, and up to 2 GiB after
    `--long=31`, in each process that reads one.
    """

    def __init__(self, name: str, new: Callable[[], Any], error: type[Exception], padding: bytes):
        """Opens a file whose streams stand one after another; see `_streams`."""
        self._new, self._error, self._padding = new, error, padding
        self._file = open_bytes(name)
        self._stream: Any = None
        self._rest = b""  # compressed bytes that belong to the next stream
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._rest or self._file.read(PACKED)
            self._rest = b""
            if not data:
                if self._stream is not None:
                    raise EOFError("compressed file ended before the end of its last stream")
                return 0
            if self._stream is None:
                data = data.lstrip(self._padding)
                if not data:
                    continue
                self._stream = self._new()
            try:
                self._ready = memoryview(self._stream.decompress(data))
            except self._error as error:
                raise zlib.error(str(error)) from None
            if self._stream.eof:
                self._rest, self._stream = self._stream.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_blocks(file: io.BufferedIOBase, name: str) -> Iterator[bytes]:
    """The rest of an open file in blocks.

    Raises:
        DamagedFile: a compressed file ends early or is damaged.
        UserError: the system does not let it be read, which says nothing about its text.
    """
    while True:
        try:
            block = file.read(BLOCK)
        except DAMAGED as error:
            raise DamagedFile(f"{name} is damaged or cut short: {error}") from None
        except OSError as error:
            raise UserError(f"cannot read {name}: {reason(error)}") from error
        if not block:
            return
        yield block


def read_pieces(
    part: Part, separator: re.Pattern[bytes] | Separator, longest: int | None = None
) -> Iterator[FilePiece]:
    """The pieces of a part between matches of `separator`; a last empty piece is left out.

    A piece belongs to the part in which it begins; ranges of one file share no piece and lose none
    if the separator is a newline. The pieces are those of the whole text, wherever the blocks end
    that it is read in: what a match consists of must be decided by the AHEAD bytes behind it.
    A mark of the byte order at the beginning of the file is no text.

    Args:
        part: of a file.
        separator: of at most TAIL bytes.
        longest: bytes of a piece; of a longer one, which is not held, no data are given.

    Raises:
        DamagedFile: see `read_blocks`.
    """
    ranged = not part.name.endswith(COMPRESSED)
    with open_file(part.name) as file:
        offset = _begin_of(part, file)
        if offset is None:
            return
        pending, number, last = b"", 0, False
        dropped = 0  # bytes of a long piece before those that are pending
        blocks = itertools.chain(read_blocks(file, part.name), (None,))
        at_beginning = offset == 0
        waiting: list[bytes] = []
        for block in blocks:
            waiting.append(block or b"")
            last = block is None
            # A long piece is looked through a few times, not once for each of its blocks.
            waited = sum(map(len, waiting))
            too_many = longest is not None and len(pending) + waited > longest + TAIL
            if not (last or too_many) and waited < len(pending):
                continue
            pending, waiting = b"".join([pending, *waiting]), []
            if at_beginning and (last or len(pending) >= len(BYTE_ORDER_MARK)):
                if pending.startswith(BYTE_ORDER_MARK):
                    pending, offset = pending[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
                at_beginning = False
            begin, decided = 0, len(pending) - (0 if last else AHEAD)
            for match in () if at_beginning else separator.finditer(pending):
                if match.end() > decided:
                    break
                first = offset + begin - dropped
                if ranged and first >= part.stop:
                    return
                yield _piece(pending[begin : match.start()], first, number, dropped, longest)
                begin, number, dropped = match.end(), number + 1, 0
            pending, offset = pending[begin:], offset + begin
            if longest is not None and len(pending) > longest + TAIL:
                more = len(pending) - TAIL
                pending, offset, dropped = pending[more:], offset + more, dropped + more
        if pending and not (ranged and offset - dropped >= part.stop):
            yield _piece(pending, offset - dropped, number, dropped, longest)


def _begin_of(part: Part, file: io.BufferedIOBase) -> int | None:
    """Moves a file to the first line that begins in a part; None: none does."""
    if not part.start:
        return 0
    with errors_told(f"cannot read {part.name}"):
        at = part.start - 1
        file.seek(at)
        while at < part.stop - 1 and (block := file.read(min(BLOCK, part.stop - 1 - at))):
            if (end := block.find(b"\n")) >= 0:
                file.seek(at + end + 1)
                return at + end + 1
            at += len(block)
    return None


def _piece(data: bytes, offset: int, number: int, dropped: int, longest: int | None) -> FilePiece:
    size = dropped + len(data)
    too_long = longest is not None and size > longest
    return FilePiece(b"" if too_long else data, offset, number, size if too_long else 0)


def line_number(part: Part, piece: FilePiece) -> int:
    """The number of a piece's line in its file, from 1, when pieces are lines."""
    number = piece.number + 1
    if part.start:
        with open_bytes(part.name) as file:
            left = piece.offset
            number = 1
            while left > 0 and (block := file.read(min(BLOCK, left))):
                number += block.count(b"\n")
                left -= len(block)
    return number
