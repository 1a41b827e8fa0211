"""Folders in object stores, at URLs such as gs://bucket/run, by fsspec.

An object store keeps whole objects by their names. Writing one is atomic and a reader by name sees
the newest; but there are no folders, nothing is appended to, renamed or locked, and a list of names
may lack the newest. What is here asks for no more than that: it works with every file system that
fsspec knows.

Programs that want files, and most do, get a copy of the folder on this machine: `local_copy`.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lmjax.config import UserError
from lmjax.files import URL, errors_told, local_path, lock, usual_cache, write_atomically

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# Of the schemes that fsspec knows, those where nothing of ours can be written.
READ_ONLY = {"http", "https", "hf", "git", "github", "gist", "zip", "tar", "libarchive", "data"}
# Those that wrap another scheme, or are no place at all.
REFUSED = {"blockcache", "cached", "dir", "filecache", "generic", "reference", "simplecache"}
HERE = {"file", "local"}
ORIGIN = ".origin.json"  # in a copy: where it is from, and what of it was copied
INDEX = "index.json"  # in a run folder: the names of its objects, written after them
CHECKPOINT = re.compile(r"checkpoints/(\d+)/(.+)")  # of a run folder, copied one by one
TOGETHER = 8  # objects that are read or written side by side


def is_url(path: str | os.PathLike) -> bool:
    """True where a path is a URL, also one of a place on this machine."""
    return URL.match(os.fspath(path)) is not None


def check_path(path: str | os.PathLike, name: str, write: bool = False) -> None:
    """Sees that a path can be served: one of this machine, or a URL whose package is installed.

    Nothing is asked of the network, and nothing is made.

    Args:
        path: as the user gave it; may be empty.
        name: of the setting: stands in the message.
        write: whether it must be possible to write there.

    Raises:
        UserError: it cannot; the message says what can, and which package or extra is missing.
    """
    if is_url(path):
        _filesystem_class(path, name, write)
    else:
        local_path(path, name)


def _filesystem_class(path: str | os.PathLike, name: str, write: bool) -> type:
    """The class of fsspec that serves a URL; see `check_path`."""
    import fsspec

    text = os.fspath(path)
    scheme = URL.match(text)[1].lower()
    if scheme in HERE:
        raise UserError(f"{name}={text}: leave out {scheme}://, and give the path")
    known = {*fsspec.available_protocols(), *fsspec.registry} - REFUSED
    if "::" in text or scheme not in known:
        raise UserError(
            f"{name}={text}: {scheme}:// cannot be served. Give a path of this machine, gs:// "
            "(pip install 'lmjax[gcs]'), s3:// (pip install 'lmjax[s3]'), or another scheme of "
            "fsspec's"
        )
    if write and scheme in READ_ONLY:
        raise UserError(
            f"{name}={text}: nothing can be written to {scheme}://. Give a path of this machine, or"
            " a bucket (gs://, s3://)"
        )
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'lmjax[{extra}]'" if extra else str(error)
        raise UserError(
            f"{name}={text}: {scheme}:// needs a package that is not installed: {remedy}"
        ) from None


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    """Makes an OSError of what a library of a store raises, each its own kind."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        words = str(error).partition("\n")[0][:300]
        raise OSError(errno.EIO, f"{type(error).__name__}: {words}") from error


class Objects:
    """The objects below a URL, by their names ("checkpoints/3/manifest.json").

    All methods raise OSError where the store cannot be reached or does not let them.
    """

    def __init__(self, url: str | os.PathLike, name: str = "folder", write: bool = False):
        """See `check_path`."""
        import fsspec

        made = _filesystem_class(url, name, write)
        scheme, _, rest = os.fspath(url).partition(":")
        # pathlib makes one slash of two.
        self.url = f"{scheme.lower()}://{rest.lstrip('/').rstrip('/')}"
        with errors_told(f"cannot reach {name}={self.url}"), _network_errors():
            options = made._get_kwargs_from_urls(self.url)
            # A list that was kept would hide what others write, and what this process did.
            options |= {"use_listings_cache": False}
            self.fs = fsspec.filesystem(scheme.lower(), **options)
            self._root = self.fs._strip_protocol(self.url).rstrip("/")

    def path(self, name: str) -> str:
        """The object's name in the store; of "" that of the place itself."""
        return f"{self._root}/{name}" if name else self._root

    def read(self, name: str) -> bytes | None:
        """All of an object; None where there is none."""
        with _network_errors():
            try:
                return self.fs.cat_file(self.path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Puts an object, whole or not at all, in the place of one that was there."""
        with _network_errors():
            self.fs.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Puts an object where there is none, and returns whether it did.

        gs:// and s3:// decide between two that try it at once. Other file systems of fsspec may
        look first and write then, without a word: read it again to see whose it is.
        """
        with _network_errors():
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def upload(self, name: str, path: Path) -> None:
        """Puts a file of this machine; the object appears when it is complete."""
        with _network_errors():
            self.fs.put_file(str(path), self.path(name))

    def download(self, name: str, path: Path) -> bool:
        """Makes a file of an object, whole or not at all; False where there is no object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with _network_errors():
            try:
                self.fs.get_file(self.path(name), str(unfinished))
                unfinished.replace(path)
            except FileNotFoundError:
                return False
            finally:
                unfinished.unlink(missing_ok=True)
        return True

    def copy(self, name: str, target: str) -> None:
        """Gives an object's content another name, in the store itself."""
        with _network_errors():
            self.fs.cp_file(self.path(name), self.path(target))

    def delete(self, name: str) -> None:
        """Removes an object, if it is there."""
        with _network_errors(), contextlib.suppress(FileNotFoundError, KeyError):
            self.fs.rm_file(self.path(name))

    def mark(self, name: str) -> str | None:
        """A word that changes when the object is written again; None where there is no object."""
        with _network_errors():
            try:
                return self.fs.ukey(self.path(name))
            except FileNotFoundError:
                return None

    def is_object(self) -> bool:
        """True where the URL names an object, not a folder."""
        with _network_errors():
            return self.fs.isfile(self._root)

    def listed(self) -> list[str]:
        """The names that the store lists, in order: the newest may be missing."""
        with _network_errors():
            try:
                found = self.fs.find(self._root)
            except FileNotFoundError:
                return []
        below = f"{self._root}/"
        return sorted(name.removeprefix(below) for name in found if name.startswith(below))

    def names(self) -> list[str]:
        """The names in a folder: by its index where it has one, else as the store lists them."""
        index = self.index()
        return self.listed() if index is None else index

    def index(self) -> list[str] | None:
        """The names of a run folder's objects, whatever the store lists; None: it has no index.

        Raises:
            UserError: it is damaged.
        """
        if (data := self.read(INDEX)) is None:
            return None
        try:
            return sorted(map(str, json.loads(data)["files"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.url}/{INDEX} is damaged: delete it, and the store's list is taken"
            ) from None


def index_of(names: Iterable[str]) -> bytes:
    """The content of the index with these names."""
    return json.dumps({"files": sorted(names)}, indent=0).encode()


def side_by_side(action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Results of `action` for each item; some are done at once. The first error is raised."""
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(action, items))


def copies() -> Path:
    """The folder of all copies, in the cache folder ($LMJAX_CACHE, or ~/.cache/lmjax)."""
    return usual_cache() / "remote"


def copy_path(url: str, kind: str = "") -> Path:
    """The path of a copy, named by the last part of its URL; `kind` tells several apart."""
    words = re.sub(r"[^A-Za-z0-9.-]+", "-", url)[:40]
    name = url.rpartition("/")[2] or "folder"
    return copies() / f"{words}-{hashlib.sha256(url.encode()).hexdigest()[:12]}{kind}" / name


def read_origin(folder: Path) -> dict[str, Any]:
    """The "url" of a copy, and what else was noted there; empty for a folder that is no copy."""
    with contextlib.suppress(OSError, ValueError, UserError):
        if folder.absolute().is_relative_to(copies().absolute()):
            return json.loads((folder / ORIGIN).read_text("utf-8"))
    return {}


def local_copy(path: str | os.PathLike, name: str) -> Path:
    """A path of this machine that holds what is at `path`: itself, or of a URL a copy.

    A copy is made once, and then brought up to date: only objects that were written since are read
    again. Of a run folder the checkpoints are left out: `Checkpointer` fetches the one it reads.

    Args:
        path: file or folder, as the user gave it.
        name: of the setting, or of what the path is for: stands in the message.

    Raises:
        UserError: the URL cannot be served or read, nothing is there, or the copy cannot be
            written. A path of this machine is not looked at.
    """
    if not is_url(path):
        return local_path(path, name)
    objects = Objects(path, name)
    target = copy_path(objects.url)
    with errors_told(f"cannot copy {name}={objects.url} to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".lock").open("a") as file:
            lock(file, wait=True)
            if objects.is_object():
                _copy_file(objects, target)
            elif not copy_files(objects, target):
                raise UserError(f"{name}={objects.url}: there is nothing")
    return target


def _copy_file(objects: Objects, target: Path) -> None:
    """Brings the copy of one object up to date."""
    known = target.parent / ORIGIN
    mark = objects.mark("")
    if not (target.is_file() and known.is_file() and known.read_text("utf-8") == mark):
        objects.download("", target)
        known.write_text(mark, "utf-8")


def copy_files(objects: Objects, target: Path, **origin: Any) -> bool:
    """Brings the copy of a folder up to date, less its checkpoints; returns whether it has files.

    Args:
        objects: what is copied.
        target: the folder to copy to.
        origin: more for `read_origin` to return.
    """
    names = [name for name in objects.names() if not CHECKPOINT.match(name) and _is_safe(name)]
    known = read_origin(target).get("marks", {})
    marks = dict(zip(names, side_by_side(objects.mark, names), strict=True))
    stale = [n for n in names if marks[n] != known.get(n) or not (target / n).is_file()]
    side_by_side(lambda name: objects.download(name, target / name), stale)
    for name in known.keys() - marks.keys():
        (target / name).unlink(missing_ok=True)
    if names or origin:
        target.mkdir(parents=True, exist_ok=True)
        about = {"url": objects.url, "marks": marks, **origin}
        write_atomically(target / ORIGIN, json.dumps(about))
    return bool(names)


def _is_safe(name: str) -> bool:
    """True for the name of a file below the folder: an index may say anything."""
    parts = name.split("/")
    return all(parts) and not {".", "..", ORIGIN} & set(parts)


def send_folder(folder: Path, objects: Objects, last: str, index: bool) -> None:
    """Puts all files of a folder, that of the name `last` at the end: then it is complete.

    Args:
        folder: the files.
        objects: where to.
        last: name of a file.
        index: whether the names go with them, as for a run.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    first = [name for name in names if name != last]
    side_by_side(lambda name: objects.upload(name, folder / name), first)
    if index:
        objects.write(INDEX, index_of(names))
    if last in names:
        objects.upload(last, folder / last)


def find_urls(pattern: str, name: str) -> list[str]:
    """The URLs of the objects that a pattern names, in order; a URL of one object is itself.

    Raises:
        UserError: the store cannot be read.
    """
    objects = Objects(pattern, name)
    with errors_told(f"cannot read {pattern}"), _network_errors():
        path = objects.path("")
        if objects.fs.isfile(path):
            return [objects.url]
        found = objects.fs.glob(path, detail=True)
    return sorted(
        objects.fs.unstrip_protocol(path) for path, info in found.items() if info["type"] == "file"
    )


def url_is_folder(url: str) -> bool:
    """True where objects lie below a URL. OSError where the store cannot be read."""
    objects = Objects(url)
    with _network_errors():
        return objects.fs.isdir(objects.path(""))


def url_state(url: str) -> tuple[int, str]:
    """Bytes of an object, and what changes when it is written again. OSError: there is none."""
    objects = Objects(url)
    with _network_errors():
        return objects.fs.size(objects.path("")), objects.fs.ukey(objects.path(""))


def open_url(url: str) -> io.BufferedIOBase:
    """An object as a file to read: sought in and read in pieces, not copied. OSError: it cannot."""
    objects = Objects(url)
    with _network_errors():
        return objects.fs.open(objects.path(""), "rb")
