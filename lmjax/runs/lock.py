"""The lock of a run folder: one process creates or resumes a run, and nobody else meanwhile."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from lmjax.config import UserError
from lmjax.data.cleaning.pipeline import WORK
from lmjax.files import errors_told, lock, reason
from lmjax.launch import is_first, on_first
from lmjax.remote import is_url
from lmjax.runs.changes import check_continues
from lmjax.runs.checkpoint_folder import CheckpointFolder
from lmjax.runs.folder import LOCK, RunFolder
from lmjax.runs.remote_run import follow, remote_folder


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def lock_run_folder(experiment: Any, warn: Callable[[str], None] = _say) -> Iterator[RunFolder]:
    """Creates or resumes the run folder `experiment.output`, and holds its lock.

    A folder that this call has made is removed again when a UserError ends it before there is a
    checkpoint, a file of replies, or unfinished cleaning: nothing half-written is left behind. Of
    several processes the first one does it all.

    Args:
        experiment: a config with `output`, and `may_change` that says which settings may.
        warn: is told where nothing can keep other processes out.

    Raises:
        UserError: the folder holds something else, cannot be used, another process is writing in
            it, or it is the run of an experiment that differs in settings that may not change.
    """
    with ExitStack() as held:
        folder = RunFolder(_on_this_machine(experiment.output, held, warn))
        fresh = []  # whether this call has made the folder

        def enter() -> None:
            fresh.append(held.enter_context(_entered(folder, experiment, warn)))

        on_first(enter)
        try:
            yield folder
        except UserError:
            with suppress(UserError, OSError):  # of a disk that cannot be used, nothing is removed
                if any(fresh) and not _has_work(folder):
                    folder.remove()
            raise


def _has_work(folder: RunFolder) -> bool:
    """Returns whether a command could go on from what is in the folder."""
    if (folder.path / WORK).is_dir() or any(folder.replies.glob("*.jsonl")):
        return True
    return bool(CheckpointFolder(folder.checkpoints).steps())


def _on_this_machine(output: str, held: ExitStack, warn: Callable[[str], None]) -> str | Path:
    """The output, or the copy to train in; the first one's is locked and sent until `held` ends.

    Raises:
        UserError: see `remote_folder`.
    """
    if not is_url(output):
        return output
    copies: list[Path] = []

    def enter() -> None:
        copies.append(held.enter_context(remote_folder(output, warn)))

    on_first(enter)
    if not is_first():
        copies.append(held.enter_context(follow(output, jax.process_index())))
    return copies[0]


@contextmanager
def _entered(folder: RunFolder, experiment: Any, warn: Callable[[str], None]) -> Iterator[bool]:
    """The folder with its config, locked; gives whether it is new."""
    with errors_told(f"cannot write in output={folder.location}"):
        fresh = not folder.config.is_file()
        # A kill may have left hidden files before there was a config.
        found = os.listdir(folder.path) if folder.path.is_dir() else []
    if fresh and any(not name.startswith(".") for name in found):
        raise UserError(
            f"output={experiment.output} exists and is not a run folder (it holds no config.json): "
            "choose another output"
        )
    with _locked(folder.path, warn):
        if fresh:
            folder.write_config(experiment)
        else:
            check_continues(folder, experiment)
        yield fresh


@contextmanager
def _locked(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Holds the folder's lock; the system frees it when the process ends, however it ends."""
    with errors_told(f"cannot write in output={path}"):
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a+")
    try:
        try:
            if not lock(file):
                warn(
                    f"The file system of {path} knows no locks, so nothing keeps a second process "
                    "from training there at the same time: see that there is none."
                )
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {path}: wait for it, or choose another output"
            ) from error
        except OSError as error:
            raise UserError(f"cannot lock output={path}: {reason(error)}") from error
        yield
    finally:
        with suppress(OSError):  # there is nothing in it
            file.close()
