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
from collections.abc import Iterator
from typing import NamedTuple

from lmjax.config import UserError
from lmjax.config.disk import errors_told, reason
from lmjax.data.documents import Part

BLOCK = 1 << 20  # bytes read at a time
RANGE = 64 << 20  # bytes of an uncompressed file that make one part
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
AHEAD = 4  # bytes behind a separator that decide where it ends: up to two line breaks
LARGEST_WINDOW = 1 << 31  # bytes that a .zst file may refer back to: zstd's own limit, --long=31
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class Piece(NamedTuple):
    """Bytes between two separators."""

    data: bytes
    offset: int  # of the first byte, in the (decompressed) file
    number: int  # of the piece, from 0 where reading began


class DamagedFile(Exception):
    """A compressed file that ends early or is not what its name says."""


def find_files(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    """The files that the path patterns name, each once, sorted within a pattern.

    A folder that links lead to again is the same folder.

    Raises:
        UserError: a pattern matches no file, or names a folder.
    """
    found: dict[str, str] = {}  # by where it really lies
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
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
        for place, name in sorted(shortest.items(), key=lambda item: item[1]):
            found.setdefault(place, name)
    if not found:
        raise UserError("the source names no file: its path is empty")
    return tuple(found.values())


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
            size = os.path.getsize(name)
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
            return gzip.open(name)
        if name.endswith(".bz2"):
            return bz2.open(name)
        if name.endswith(".xz"):
            return lzma.open(name)
        if name.endswith(".zst"):
            return io.BufferedReader(_ZstdFile(name), BLOCK)
        return open(name, "rb")
    except OSError as error:
        raise UserError(f"cannot open {name}: {error.strerror or error}") from None


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a zstd file; unlike the library's own reader, notices a missing end.

    Keeps as many bytes in memory as the file's window is long: 8 MiB mostly, up to 128 MiB after
    `zstd --ultra -22`, and up to 2 GiB after `--long=31`, as each process that reads one does.
    """

    def __init__(self, name: str):
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{name} needs the zstandard package: pip install 'lmjax[zstd]'"
            ) from None
        self._error = zstandard.ZstdError
        unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._new = unpacker.decompressobj
        self._file = io.FileIO(name)
        self._frame = None
        self._rest = b""  # compressed bytes that belong to the next frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._rest or self._file.read(BLOCK)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            if self._frame is None:
                self._frame = self._new()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise zlib.error(str(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
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
            if error.errno is not None:
                raise UserError(f"cannot read {name}: {reason(error)}") from error
            # bz2 reports damage so
            raise DamagedFile(f"{name} is damaged or cut short: {error}") from None
        if not block:
            return
        yield block


def read_pieces(part: Part, separator: re.Pattern[bytes]) -> Iterator[Piece]:
    """The pieces of a part between matches of `separator`; a last empty piece is left out.

    A piece belongs to the part in which it begins; ranges of one file share no piece and lose none
    if the separator is a newline. The pieces are those of the whole text, wherever the blocks end
    that it is read in: what a match consists of must be decided by the AHEAD bytes behind it.
    A mark of the byte order at the beginning of the file is no text.

    Raises:
        DamagedFile: see `read_blocks`.
    """
    ranged = not part.name.endswith(COMPRESSED)
    with open_file(part.name) as file:
        offset = part.start
        if part.start:
            with errors_told(f"cannot read {part.name}"):
                file.seek(part.start - 1)
                offset = part.start - 1 + len(file.readline())
        pending, number, last = b"", 0, False
        blocks = itertools.chain(read_blocks(file, part.name), (None,))
        at_beginning = offset == 0
        for block in blocks:
            pending, last = pending + (block or b""), block is None
            if at_beginning and (last or len(pending) >= len(BYTE_ORDER_MARK)):
                if pending.startswith(BYTE_ORDER_MARK):
                    pending, offset = pending[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
                at_beginning = False
            begin, decided = 0, len(pending) - (0 if last else AHEAD)
            for match in () if at_beginning else separator.finditer(pending):
                if match.end() > decided:
                    break
                if ranged and offset + begin >= part.stop:
                    return
                yield Piece(pending[begin : match.start()], offset + begin, number)
                begin, number = match.end(), number + 1
            pending, offset = pending[begin:], offset + begin
        if pending and not (ranged and offset >= part.stop):
            yield Piece(pending, offset, number)


def line_number(part: Part, piece: Piece) -> int:
    """The number of a piece's line in its file, from 1, when pieces are lines."""
    number = piece.number + 1
    if part.start:
        with open(part.name, "rb") as file:
            left = piece.offset
            number = 1
            while left > 0 and (block := file.read(min(BLOCK, left))):
                number += block.count(b"\n")
                left -= len(block)
    return number
