"""Folders that appear at their path, or URL, when all of what they hold is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lmjax.config import UserError
from lmjax.files import errors_told, local_path
from lmjax.launch import is_first, on_first
from lmjax.remote import Objects, copy_path, is_url, send_folder


@contextmanager
def new_folder_anywhere(destination: str | os.PathLike, index: bool) -> Iterator[Path]:
    """A folder to write in, which appears at a path or a URL when the block ends well.

    At a URL config.json is the last object that is written: without it there is no model.

    Args:
      destination: path or URL; nothing may be there.
      index: of a URL, whether it gets the index of a run folder.

    Raises:
      UserError: see `new_folder`; or several processes would write one run folder to a URL.
    """
    if not is_url(destination):
        with new_folder(local_path(destination, "destination")) as folder:
            yield folder
        return
    if index and jax.process_count() > 1:
        raise UserError(
            f"destination={destination}: a run folder that several processes write must be one "
            "that all of them see as files; convert in one process, or into a mounted bucket"
        )
    objects = Objects(destination, "destination", write=True)
    staged = copy_path(objects.url, "-converted")

    def make() -> None:
        with errors_told(f"cannot write in destination={objects.url}"):
            if objects.is_object() or objects.names():
                raise UserError(
                    f"{objects.url} exists already and is not an empty folder: choose another one"
                )
            shutil.rmtree(staged, ignore_errors=True)

    on_first(make)
    with new_folder(staged) as folder:
        yield folder
    if is_first():
        with errors_told(f"cannot write in destination={objects.url}"):
            send_folder(staged, objects, "config.json", index)
        shutil.rmtree(staged)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name `path` when the block ends well.

    Until then it is hidden beside it, and whatever goes wrong it is removed again; one that a kill
    has left there too. Of several processes the first one makes it.

    Raises:
      UserError: `path` is there and is not an empty folder, or cannot be made; the system does not
        let the block read or write.
    """
    path = Path(os.path.realpath(path))  # where a link leads to, a folder can get its name
    partial = path.with_name(f".{path.name}.partial")

    def make() -> None:
        with errors_told(f"cannot write in {path.parent}"):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(
                    f"{path} exists already and is not an empty folder: choose another one"
                )
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)

    on_first(make)
    if not is_first():
        yield partial
        return
    try:
        yield partial
        partial.replace(path)
    except BrokenPipeError:  # of a reader of our output: no matter of files
        raise
    except OSError as error:  # a full disk, a file of the source that may not be read
        raise UserError(f"{path} was not written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
