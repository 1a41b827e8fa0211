"""The cache folder: where tokens are kept, and what is said where they cannot be."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from lmjax.config import UserError
from lmjax.files import is_full, local_path, reason

VARIABLE = "LMJAX_CACHE"
USUAL = "~/.cache/lmjax"
REMEDY = f"with data.cache=FOLDER or the environment variable {VARIABLE}"


def cache_folder(setting: str) -> pathlib.Path:
    """The folder of a setting, or else of the environment, or else the usual one.

    Raises:
        UserError: it is a URL, or there is no home to put it in.
    """
    if setting:
        return local_path(setting, "data.cache")
    if named := os.environ.get(VARIABLE):
        return local_path(named, VARIABLE)
    try:
        return pathlib.Path(USUAL).expanduser()
    except RuntimeError as error:
        raise UserError(f"there is no place for {USUAL}: {error} Name a folder {REMEDY}") from None


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
