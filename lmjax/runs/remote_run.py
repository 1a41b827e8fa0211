"""A run folder in an object store: worked on in a copy on this machine, and sent from there.

What a run writes, it writes into the copy: checkpoints, metrics, tokenizer, traces, the report.
Three things reach the store, each an object as a whole:

- Every file that has changed, each SECONDS while training goes on, before each checkpoint and at
  the end. metrics.jsonl so has every line up to a checkpoint's step before that checkpoint is
  visible. Weights & Biases' own folder stays here.
- A checkpoint, when it is complete: its files, then its manifest, then the index. Orbax itself
  could write to gs:// alone.
- The index (`index.json`): the names of all that counts. What it does not name is not there, so
  that nothing depends on what the store lists, and a kill leaves nothing half visible.

The copy lies in the cache folder, and needs room for three checkpoints. It is made anew from the
store when a run goes on, and removed when all of it has been sent.
"""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from lmjax.config import UserError
from lmjax.files import errors_told, lock, reason
from lmjax.remote import (
    CHECKPOINT,
    INDEX,
    ORIGIN,
    Objects,
    copy_files,
    copy_path,
    index_of,
    read_origin,
    side_by_side,
)
from lmjax.runs import manifest, remote_lock

SECONDS = 30.0  # between two looks for files that have changed
SHARE = 20  # times as long as sending took is waited before it is done again
STAYS = ("checkpoints", "wandb")  # folders of a run that are not sent with its files
_CHANGING = threading.Lock()  # the index has one writer, the process with the lock


class RemoteRun:
    """The store behind the copy of a run folder."""

    def __init__(self, folder: Path) -> None:
        """Takes a folder that `remote_folder` or `local_copy` made."""
        origin = read_origin(folder)
        self.folder, self.token = folder, origin.get("token")
        self.objects = Objects(origin["url"])

    @classmethod
    def of(cls, folder: Path) -> "RemoteRun | None":
        """The store behind a folder; None where it is no copy."""
        return cls(folder) if "url" in read_origin(folder) else None

    @property
    def is_ours(self) -> bool:
        """True where this process trains: then all that changes is sent."""
        return self.token is not None

    def write(self, name: str, text: str) -> None:
        """Puts one file of the run now. OSError: it cannot be."""
        self.objects.write(name, text.encode("utf-8"))

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the store, in order. OSError: it cannot be read."""
        found = filter(None, map(CHECKPOINT.fullmatch, self.objects.names()))
        return sorted(int(match[1]) for match in found if match[2] == manifest.NAME)

    def fetch(self, step: int, target: Path) -> None:
        """Copies a checkpoint to `target`, unless it is there; what the store lacks is left out.

        Raises:
            OSError: the store cannot be read, or `target` not written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / "fetch.lock").open("a") as file:
            lock(file, wait=True)  # processes that read the same run share its copy
            self._fetch(step, target)

    def _fetch(self, step: int, target: Path) -> None:
        head = f"checkpoints/{step}"
        described = self.objects.read(f"{head}/{manifest.NAME}")
        with contextlib.suppress(OSError):
            if (target / manifest.NAME).read_bytes() == described:
                return
        unfinished = target.with_name(f".removing-fetched-{step}")
        for path in (unfinished, target):
            shutil.rmtree(path, ignore_errors=True)
        unfinished.mkdir(parents=True)
        found = filter(None, map(CHECKPOINT.fullmatch, self.objects.names()))
        names = [match[2] for match in found if int(match[1]) == step and _is_inside(match[2])]
        side_by_side(lambda n: self.objects.download(f"{head}/{n}", unfinished / n), names)
        unfinished.rename(target)

    def add(self, step: int, folder: Path, elsewhere: Collection[str] = ()) -> None:
        """Sends a complete checkpoint, which is visible when this returns.

        Args:
            step: its name.
            folder: the checkpoint.
            elsewhere: files of it that other machines have sent.

        Raises:
            LostLock: another process has taken the run over.
            OSError: something cannot be sent.
        """
        head = f"checkpoints/{step}"
        if step in self.steps():
            self.drop(step)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = sorted(str(path.relative_to(folder)) for path in paths)
        first = [name for name in names if name != manifest.NAME]
        side_by_side(lambda name: self.objects.upload(f"{head}/{name}", folder / name), first)
        self.objects.upload(f"{head}/{manifest.NAME}", folder / manifest.NAME)
        self.change({f"{head}/{name}" for name in (*names, *elsewhere)})

    def drop(self, step: int) -> None:
        """Removes a checkpoint, first of all from the index. Raises what `add` raises."""
        names = [name for name in self.objects.names() if name.startswith(f"checkpoints/{step}/")]
        self.change(without=names)
        side_by_side(self.objects.delete, names)

    def change(self, added: Collection[str] = (), without: Collection[str] = ()) -> None:
        """Changes the index. Raises what `add` raises."""
        with _CHANGING:
            before = self.objects.index() or []
            names = sorted((set(before) | set(added)) - set(without))
            remote_lock.check(self.objects, self.token)
            if not names:
                self.objects.delete(INDEX)
            elif names != before:
                self.objects.write(INDEX, index_of(names))


class Sender:
    """Sends the files of a run that have changed."""

    def __init__(self, run: RemoteRun) -> None:
        self.run = run
        self._sent = _states(run.folder)
        self._alone = threading.Lock()

    def send(self) -> None:
        """Sends what has changed since the last time, and removes what was removed.

        Raises:
            LostLock: another process has taken the run over.
            OSError: something cannot be sent.
        """
        with self._alone:
            now = _states(self.run.folder)
            changed = [name for name in now if self._sent.get(name) != now[name]]
            gone = self._sent.keys() - now.keys()
            if changed or gone:
                remote_lock.check(self.run.objects, self.run.token)
                side_by_side(self._send_file, changed)
                self.run.change(now.keys(), gone)
                side_by_side(self.run.objects.delete, gone)
                self._sent = now

    def _send_file(self, name: str) -> None:
        """Sends a file as it is now: some grow while they are read, which no store takes well."""
        with tempfile.NamedTemporaryFile(dir=self.run.folder.parent) as now:
            shutil.copyfile(self.run.folder / name, now.name)
            self.run.objects.upload(name, Path(now.name))

    def keep_sending(self, stop: threading.Event, warn: Callable[[str], None]) -> None:
        """Sends again and again until it is told to stop; what fails is tried again."""
        pause, failed = SECONDS, False
        while not stop.wait(pause):
            began = time.monotonic()
            try:
                self.send()
                failed = False
            except remote_lock.LostLock:
                return  # is said by the lock, and ends the run at the next checkpoint
            except (OSError, UserError) as error:
                if not failed:
                    warn(f"{self.run.objects.url} lacks the newest files: {reason(error) or error}")
                failed = True
            pause = max(SECONDS, SHARE * (time.monotonic() - began))


_SENDERS: dict[Path, Sender] = {}  # of the runs that this process trains, by their copies


def send_files(folder: Path) -> None:
    """Sends the changed files of a run that this process trains, now; raises what `send` raises."""
    if sender := _SENDERS.get(folder):
        sender.send()


@contextlib.contextmanager
def remote_folder(url: str, warn: Callable[[str], None]) -> Iterator[Path]:
    """The copy of a run folder to train in, alone; what is written there is sent to the store.

    Raises:
        UserError: the URL cannot be served or written, another process trains there, it holds
            something else than a run, or at the end something could not be sent.
    """
    objects = Objects(url, "output", write=True)
    target = copy_path(objects.url, "-training")
    with remote_lock.remote_lock(objects, target.parent / ".lock", warn) as token:
        with errors_told(f"cannot use output={objects.url}"):
            _index(objects)
            shutil.rmtree(target, ignore_errors=True)
            copy_files(objects, target, token=token)
        sender, stop = Sender(RemoteRun(target)), threading.Event()
        sending = threading.Thread(target=sender.keep_sending, args=(stop, warn), daemon=True)
        _SENDERS[target] = sender
        sending.start()
        try:
            yield target
            _finish(sender, sending, stop)
        except SystemExit:  # after Ctrl-C or SIGTERM: it goes on another time
            _finish(sender, sending, stop)
            raise
        except BaseException:
            with contextlib.suppress(OSError, UserError):  # the error that is raised says more
                _finish(sender, sending, stop)
            raise
        finally:
            stop.set()
            del _SENDERS[target]


@contextlib.contextmanager
def follow(url: str, process: int) -> Iterator[Path]:
    """The copy of another process than the first one, which sends its pieces of checkpoints alone.

    Raises:
        UserError: the store cannot be read.
    """
    objects = Objects(url, "output", write=True)
    target = copy_path(objects.url, f"-training-{process}")
    with errors_told(f"cannot use output={objects.url}"):
        shutil.rmtree(target, ignore_errors=True)
        copy_files(objects, target, token=remote_lock.token_of(objects))
    yield target
    shutil.rmtree(target, ignore_errors=True)


def _finish(sender: Sender, sending: threading.Thread, stop: threading.Event) -> None:
    """Sends what is left, and removes the copy.

    Raises:
        UserError: not all could be sent; the copy stays.
    """
    run = sender.run
    stop.set()
    sending.join()
    with errors_told(f"not all of the run is in {run.objects.url}; it is in {run.folder}"):
        sender.send()
    shutil.rmtree(run.folder, ignore_errors=True)


def _index(objects: Objects) -> None:
    """Gives a run folder that came to the store by other means its index.

    Raises:
        UserError: the folder holds something that is no run.
    """
    if objects.index() is not None:
        return
    names = [name for name in objects.listed() if not name.rpartition("/")[2].startswith(".")]
    if objects.read("config.json") is not None:
        objects.write(INDEX, index_of(names))
    elif names:
        raise UserError(
            f"output={objects.url} exists and is not a run folder (it holds no config.json): "
            "choose another output"
        )


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of each file of a run that is sent, by name."""
    found = {}
    for above, folders, files in os.walk(folder):
        here = Path(above).relative_to(folder)
        folders[:] = [name for name in folders if str(here / name) not in STAYS]
        for name in files:
            if not name.startswith(".") and name != ORIGIN:
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    state = (folder / here / name).stat()
                    found[str(here / name)] = state.st_mtime_ns, state.st_size
    return found


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return all(parts) and not {".", ".."} & set(parts)
