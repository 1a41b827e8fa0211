"""The cache folder: where tokens are kept, and what is said where they cannot be.

Tokens are mapped into memory, so they are files of this machine. Where `data.cache` is a URL they
are made once, for all machines: what is finished is sent there, and copied from there.
"""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from lmjax.config import UserError
from lmjax.files import VARIABLE, errors_told, is_full, local_path, reason, usual_cache
from lmjax.launch import is_first
from lmjax.remote import INDEX, Objects, is_url, send_folder, side_by_side

REMEDY = f"with data.cache=FOLDER or the environment variable {VARIABLE}"


def cache_folder(setting: str) -> pathlib.Path:
    """The folder of a setting, or else of the environment, or else the usual one.

    Of a URL it is the usual one, where the copies lie.

    Raises:
        UserError: there is no home to put it in.
    """
    here = setting and not is_url(setting)
    return local_path(setting, "data.cache") if here else usual_cache(REMEDY)


@contextlib.contextmanager
def shared(setting: str, kind: str, folder: pathlib.Path) -> Iterator[None]:
    """Around what makes a folder of the cache, unless it is there: takes it from the URL, or sends.

    Args:
        setting: `data.cache`; a folder of this machine is shared with nobody.
        kind: of what is made: "tokens", for instance.
        folder: of this machine; the block makes it, as a whole, where it is missing.

    Raises:
        UserError: the URL cannot be read or written.
    """
    if not is_url(setting):
        yield
        return
    objects = Objects(f"{setting.rstrip('/')}/{kind}/{folder.name}", "data.cache", write=True)
    with errors_told(f"cannot read {objects.url}"):
        missing = not folder.exists() and not _fetch(objects, folder)
    yield
    if missing and is_first():
        with errors_told(f"cannot write {objects.url}"):
            send_folder(folder, objects, INDEX, index=True)


def _fetch(objects: Objects, folder: pathlib.Path) -> bool:
    """Copies what was finished and sent by another machine; False where nothing was.

    The index is the last that is sent, so all that it names is there.
    """
    names = objects.index()
    if not names:
        return False
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=_made(folder.parent)) as unfinished:
        whole = pathlib.Path(unfinished) / folder.name
        found = side_by_side(lambda name: objects.download(name, whole / name), names)
        if not all(found):
            return False
        with contextlib.suppress(OSError):  # another process was first
            whole.rename(folder)
    return True


def _made(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def cache_errors_told(folder: pathlib.Path) -> Iterator[None]:
    """Says what to set where the block cannot keep something in a folder of the cache.

    Raises:
        UserError: instead of an error of the operating system.
    """
    try:
        yield
    except BrokenPipeError:  # of a reader of our output
        raise
    except OSError as error:
        if not is_full(error):
            raise UserError(
                f"cannot keep tokens in {folder.parent} ({reason(error)}): name a folder that can "
                f"be written {REMEDY}"
            ) from error
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(folder.parent).free / 1e9:.1f} GB free)"
        raise UserError(
            f"the disk is full while tokenizing into {folder}{free}; free some space, or name "
            f"another place {REMEDY}. What is finished is kept and used again"
        ) from error
