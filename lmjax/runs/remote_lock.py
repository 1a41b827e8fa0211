"""The lock of a run folder in an object store, which has no locks: an object that is kept fresh.

The owner writes the object again every BEAT seconds, each time with another number. Whoever finds
it there watches it: a number that changes is of a process that lives; one that stays for PATIENCE
seconds is of one that was killed. No clocks are compared. On the owner's own machine a file's lock
says at once whether it lives.

An owner that slept longer than that (a machine that was suspended) has lost the lock: `check` says
so before anything becomes visible in the store. Between the two lies one request, in which it could
still be lost; what is then written is a whole checkpoint of the same run.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from lmjax.config import UserError
from lmjax.files import errors_told, lock
from lmjax.remote import Objects

NAME = ".lock"
BEAT = 15.0  # seconds between two signs of life
PATIENCE = 90.0  # seconds without one after which a process is taken for dead
LOOK = 2.0  # seconds between two looks at another one's lock


class LostLock(UserError):
    """Another process has taken the run over."""


@contextlib.contextmanager
def remote_lock(objects: Objects, local: Path, warn: Callable[[str], None]) -> Iterator[str]:
    """Holds the lock of a run folder in a store, and gives its token.

    Args:
        objects: the run folder.
        local: file whose lock is held too; the owner's processes on one machine share it.
        warn: is told that a dead owner is waited for, and of signs of life that fail.

    Raises:
        UserError: another process holds it, or the store cannot be read or written.
    """
    with errors_told(f"cannot lock {objects.url}"), _local_lock(local, objects.url):
        token = _take(objects, local, warn)
        stop = threading.Event()
        beating = threading.Thread(
            target=_beat, args=(objects, token, local, stop, warn), name="lock", daemon=True
        )
        beating.start()
        try:
            yield token
        finally:
            stop.set()
            beating.join()
            with contextlib.suppress(OSError):  # then it is taken for dead later
                if _owner(objects).get("token") == token:
                    objects.delete(NAME)


def check(objects: Objects, token: str) -> None:
    """Sees that the lock is held still.

    Raises:
        LostLock: it is another process's.
        OSError: the store cannot be read.
    """
    if (found := _owner(objects).get("token")) != token:
        raise LostLock(
            f"{objects.url} is not this process's any more: "
            + (f"{_described(_owner(objects))} has taken it over" if found else "its lock is gone")
        )


def token_of(objects: Objects) -> str | None:
    """The token of whoever holds the lock; None: nobody does. OSError: it cannot be read."""
    return _owner(objects).get("token")


@contextlib.contextmanager
def _local_lock(path: Path, url: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise _refusal(url, "on this machine") from None
        yield


def _take(objects: Objects, local: Path, warn: Callable[[str], None]) -> str:
    """Puts our lock where none is, or in the place of a dead owner's."""
    token = uuid.uuid4().hex
    while not objects.create(NAME, _content(token, local, 0)):
        before = _owner(objects)
        if not before:
            continue  # it has gone meanwhile
        if not _is_dead_here(before, local):
            _watch(objects, before, warn)
        if _owner(objects).get("token") == before.get("token"):
            objects.delete(NAME)
    # Not every file system of fsspec decides between two that create at once.
    if _owner(objects).get("token") != token:
        raise _refusal(objects.url, f"by {_described(_owner(objects))}")
    return token


def _watch(objects: Objects, before: dict, warn: Callable[[str], None]) -> None:
    """Returns when the owner is dead or has gone; UserError where it lives."""
    warn(
        f"{objects.url} is locked by {_described(before)}. Waiting {PATIENCE:.0f} s for a sign of "
        "life: without one, this run goes on from its last checkpoint"
    )
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        time.sleep(LOOK)
        found = _owner(objects)
        if not found:
            return
        if found != before:
            raise _refusal(objects.url, f"by {_described(found)}")


def _beat(
    objects: Objects, token: str, local: Path, stop: threading.Event, warn: Callable[[str], None]
) -> None:
    """Writes signs of life until it is stopped or the lock is lost."""
    number = 0
    while not stop.wait(BEAT):
        number += 1
        try:
            check(objects, token)
            objects.write(NAME, _content(token, local, number))
        except LostLock as lost:
            warn(str(lost))
            return
        except OSError as error:
            warn(f"no sign of life could be written to {objects.url}: {error}")


def _content(token: str, local: Path, number: int) -> bytes:
    about = {"token": token, "beat": number, "host": _host(), "pid": os.getpid()}
    return json.dumps(about | {"file": str(local.absolute())}).encode()


def _owner(objects: Objects) -> dict:
    """The lock's content; empty where there is no lock."""
    data = objects.read(NAME)
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {"host": "unknown", "beat": (data or b"").hex()[:80]}
    return found if isinstance(found, dict) else {"host": "unknown"}


def _is_dead_here(owner: dict, local: Path) -> bool:
    """True where the owner was a process of this machine and ended; `local` is locked by us."""
    if owner.get("host") != _host():
        return False
    if owner.get("file") == str(local.absolute()):
        return True
    try:
        with Path(owner["file"]).open("r+") as file:
            return lock(file)
    except (OSError, KeyError, TypeError):  # held, or another file system than the owner's
        return False


def _host() -> str:
    """This machine, until it starts again."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}"
    return socket.gethostname()


def _described(owner: dict) -> str:
    return f"process {owner.get('pid', '?')} on {str(owner.get('host', '?')).partition(' ')[0]}"


def _refusal(url: str, where: str) -> UserError:
    return UserError(
        f"another process is training in {url} ({where}): wait for it, or choose another output"
    )
