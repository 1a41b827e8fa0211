"""Files: errors of the operating system in words, paths, locks, atomic writes.

with errors_told(f"cannot write {path}"):
    path.write_text(text)
"""

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmjax.config import UserError

FULL = {errno.ENOSPC, errno.EDQUOT}
# Errors of a machine or its administration, whatever a program does; others may be a program's.
MACHINE = FULL | {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
    *(errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.EFBIG),
}
# Without locks some file systems say so, some call the request invalid, and NFS lets a number of
# Linux's own through (ENOTSUPP).
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, 524}
CODE = re.compile(r"os_error_code='(\d+)'")  # of TensorStore, which writes Orbax's arrays
FULL_WORDS = re.compile(r"no space left on device|quota exceeded", re.IGNORECASE)
VARIABLE, USUAL = "LMJAX_CACHE", "~/.cache/lmjax"  # where what can be made again is kept
# Also with one slash, as pathlib writes it, and as fsspec chains them.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/|:[^/\s]*:/)")
REMEDIES = {
    "gs": "mount the bucket (gcsfuse BUCKET FOLDER) or copy it (gcloud storage cp -r)",
    "s3": "mount the bucket (mount-s3 BUCKET FOLDER) or copy it (aws s3 cp --recursive)",
    "hf": "download it (hf download REPOSITORY --local-dir FOLDER)",
    "http": "download it",
    "https": "download it",
    "file": "leave out file://",
}


def local_path(path: str | os.PathLike, name: str) -> Path:
    """A path of this machine, with `~` put in full.

    Args:
        path: as the user gave it.
        name: of the setting, or of what the path is for: stands in the message.

    Raises:
        UserError: it is a URL, which what the path is for cannot work with; or there is no home.
    """
    text = os.fspath(path)
    if match := URL.match(text):
        remedy = REMEDIES.get(match[1].lower(), "mount or copy what is there")
        raise UserError(
            f"{name}={text}: this is a URL, and here only paths of this machine can be used; "
            f"{remedy}, and give the path"
        )
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError as error:
        raise UserError(f"{name}={text}: {error}; give the path in full") from None


def usual_cache(remedy: str = f"with the environment variable {VARIABLE}") -> Path:
    """The cache folder that the environment names, or else the usual one.

    Args:
        remedy: how else the user can name one.

    Raises:
        UserError: it is a URL, or there is no home to put it in.
    """
    if named := os.environ.get(VARIABLE):
        return local_path(named, VARIABLE)
    try:
        return Path(USUAL).expanduser()
    except RuntimeError as error:
        raise UserError(f"there is no place for {USUAL}: {error} Name a folder {remedy}") from None


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind `error`: itself, its cause, or what it came up in.

    The nearest of them, but a full disk before all others: much else fails where it is full.
    """
    found = [named for each in _chain(error) if (named := _named(each)) is not None]
    full = [each for each in found if each.errno in FULL]
    return (full or found or [None])[0]


def is_full(error: BaseException) -> bool:
    """Returns whether a full disk, or a quota, is what lies at the bottom of `error`."""
    return (found := os_error(error)) is not None and found.errno in FULL


def reason(error: BaseException) -> str | None:
    """The operating system's words behind `error`, with the file; None where there are none."""
    found = os_error(error)
    if found is None:
        return None
    words = found.strerror or str(found)  # Python programs raise some without a number
    if isinstance(found.filename, str | bytes | os.PathLike):
        path = os.fsdecode(found.filename)
        words += f": {path}"
        if link := _dangling(Path(path)):
            words += f" ({link} is a link to {os.readlink(link)}, which is not there)"
    return words


@contextlib.contextmanager
def errors_told(what: str) -> Iterator[None]:
    """Makes a UserError of an operating system's error in the block.

    Args:
        what: could not be done, for the person who waits for it: "cannot write runs/a".

    Raises:
        UserError: `what`, and the reason.
    """
    try:
        yield
    except BrokenPipeError:  # of a reader of our output: no matter of files
        raise
    except OSError as error:
        raise UserError(f"{what}: {reason(error) or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends well.

    Whoever reads `path` finds what was there or all of what is written, also after a power cut and
    where several processes or threads write it at once: each has a file of its own.

    Raises:
        OSError: of the block, or of this; what was there is as before.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut.

    Raises:
        UserError: it cannot be written; a file that was there is as before.
    """
    with errors_told(f"cannot write {path}"), replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def lock(file: Any, wait: bool = False) -> bool:
    """Takes the lock of an open file, which the system takes back when the process ends.

    Args:
        file: open for writing.
        wait: for another process that holds it.

    Returns:
        Whether it is held; False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the file system has locks, and something else went wrong.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _named(error: BaseException) -> OSError | None:
    """The exception as the operating system's, if it is one or tells of one."""
    if isinstance(error, OSError):
        return error
    words = str(error)
    if match := CODE.search(words):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    if match := FULL_WORDS.search(words):
        return OSError(errno.ENOSPC, match[0])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those behind it, nearest first, each once: they may stand in a circle."""
    waiting, seen = [error], set()
    while waiting:
        error = waiting.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        context = None if error.__suppress_context__ else error.__context__
        members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        waiting += filter(None, (error.__cause__, *members, context))


def _dangling(path: Path) -> Path | None:
    """The path, or the folder above it, that is a link to nothing."""
    for each in (path, *path.parents):
        if os.path.islink(each) and not os.path.exists(each):
            return each
    return None
