"""Sizes and hashes of files, whatever their names and folders.

A corpus that was copied is the same corpus, and one that was changed under its name is another.
Reading it costs little beside tokenizing it, and is done once: the cache knows each file by its
path, where links lead to, its number on the disk, its size and times.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

from lmjax.config import UserError
from lmjax.data.documents import Progress, digest, silent
from lmjax.data.files import open_bytes
from lmjax.files import errors_told, lock, write_atomically
from lmjax.remote import is_url, url_state

BLOCK = 64 << 20  # bytes that are hashed together; the blocks of a file are hashed side by side
PIECE = 1 << 20  # bytes read at a time
SETTLED = 2 * 10**9  # nanoseconds since its last change after which a file's times can be trusted


class FileHashes:
    """Sizes and hashes of files, each read only once as long as its size and times stay."""

    def __init__(self, folder: pathlib.Path | None = None, progress: Progress = silent):
        """Nothing is read yet.

        Args:
            folder: where hashes are kept; None: nowhere. One that cannot be written keeps none.
            progress: is told bytes that are read.
        """
        self.folder, self.progress = folder, progress

    def __call__(self, files: Sequence[str]) -> list[str]:
        """Size and SHA-256 (of the blocks' SHA-256) of each file, as one word each.

        Raises:
            UserError: one cannot be read, or changes meanwhile.
        """
        # A link may lead to another one.
        paths = [name if is_url(name) else os.path.realpath(name) for name in files]
        marks = {path: _mark(path) for path in paths}
        root = _root(paths)
        known = self._read(root)
        if _missing(marks, known):
            with self._alone(root):
                known = self._read(root)
                self._add(known, {path: marks[path] for path in _missing(marks, known)}, root)
        return [f"{known[path][0]}-{known[path][-1]}" for path in paths]

    def _add(self, known: dict[str, list], wanted: dict[str, list], root: str) -> None:
        """Hashes files, and keeps what is known by then, whatever happens."""
        trusted = time.time_ns() - SETTLED
        try:
            for path, code in self._hash(wanted):
                if _mark(path) != wanted[path]:
                    raise UserError(f"{path} was changed while it was read")
                known[path] = [*wanted[path], code]
        finally:
            settled = {path: mark for path, mark in known.items() if max(mark[1:3]) < trusted}
            self._write(root, settled)

    def _hash(self, wanted: dict[str, list]) -> Iterator[tuple[str, str]]:
        """Each file with its hash."""
        blocks = [
            (path, start)
            for path, (size, *_) in wanted.items()
            for start in range(0, max(size, 1), BLOCK)
        ]
        done, total = 0, sum(size for size, *_ in wanted.values())
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        try:
            whole = hashlib.sha256()
            for (path, start), found in zip(blocks, pool.map(_hash_block, blocks), strict=True):
                self.progress("hashing the text", done, total)
                whole.update(found)
                left = wanted[path][0] - start
                done += min(left, BLOCK)
                if left <= BLOCK:
                    yield path, whole.hexdigest()[:32]
                    whole = hashlib.sha256()
        finally:
            pool.shutdown(cancel_futures=True)

    def _path(self, root: str) -> pathlib.Path:
        return self.folder / f"{digest(root)}.json"

    def _read(self, root: str) -> dict[str, list]:
        """Known files below `root`: their marks, and the hash."""
        if self.folder is None:
            return {}
        try:
            found = json.loads(self._path(root).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        entries = found.items() if isinstance(found, dict) else ()
        return {name: mark for name, mark in entries if isinstance(mark, list) and len(mark) == 5}

    def _write(self, root: str, known: dict[str, list]) -> None:
        if self.folder is not None:
            with contextlib.suppress(UserError):  # they are read again next time
                write_atomically(self._path(root), json.dumps(known))

    @contextlib.contextmanager
    def _alone(self, root: str) -> Iterator[None]:
        """Keeps other processes from reading the same files at the same time, where that works."""
        file = None
        with contextlib.suppress(OSError):
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = self._path(root).with_suffix(".lock").open("a")
                try:
                    lock(file)
                except BlockingIOError:
                    self.progress("waiting for another process that reads the text", 0, 1)
                    lock(file, wait=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


def _root(paths: list[str]) -> str:
    """The folder, or folders, under whose name the files' hashes are kept."""
    folders = [os.path.dirname(path) for path in paths]
    if any(map(is_url, paths)):
        return " ".join(sorted(set(folders)))
    return os.path.commonpath(folders)


def _mark(path: str) -> list[int | str]:
    """Size, times and number, which a file has as long as nothing writes to it.

    Of an object, which has no such times, in place of the number what its store says of it.
    """
    with errors_told("cannot read the text"):
        if is_url(path):
            size, state = url_state(path)
            return [size, 0, 0, state]
        stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _missing(marks: dict[str, list], known: dict[str, list]) -> list[str]:
    return [path for path, mark in marks.items() if known.get(path, [])[:-1] != mark]


def _hash_block(block: tuple[str, int]) -> bytes:
    path, start = block
    hasher, left = hashlib.sha256(), BLOCK
    with errors_told("cannot read the text"), open_bytes(path) as file:
        file.seek(start)
        while left and (piece := file.read(min(PIECE, left))):
            hasher.update(piece)
            left -= len(piece)
    return hasher.digest()
