"""The end of a run of several processes: none waits for one that has ended."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from lmjax.launch.cluster import ProcessGroup
from lmjax.launch.lateness import Limits
from lmjax.launch.watch import LOST, Watch, stop_now

_watches: list[Watch] = []  # none, or this process's


def begin_watch(cluster: ProcessGroup) -> Watch:
    """Opens this process's watch over the others."""
    watch = Watch(cluster)
    watch.open()
    _watches.append(watch)
    return watch


def report(channel: str, what: str | None, step: int = 0, rank: int = 0) -> None:
    """Tells the other processes what this one does; see `Watch.report`. Alone it does nothing."""
    for watch in _watches:
        watch.report(channel, what, step, rank)


def set_limits(limits: Limits) -> None:
    """Sets when work counts as late."""
    for watch in _watches:
        watch.limits = limits


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Lets a process that fails in the block tell the others, which end too.

    Goes round `exit_on_user_error`, whose exit codes it sees. Alone it does nothing.

    Raises:
      SystemExit, Exception: of the block.
    """
    try:
        yield
    except BaseException as error:
        if not _watches:
            raise
        _end(_watches[0], error)
        raise
    for watch in _watches:
        watch.leave("", 0)


def _end(watch: Watch, error: BaseException) -> None:
    """Returns where all processes end by themselves with exit codes; else ends this one."""
    said = isinstance(error, SystemExit)
    if not said:
        sys.excepthook(type(error), error, error.__traceback__)
    code = error.code if said and isinstance(error.code, int) else 1
    why = "see what it said" if said else f"{type(error).__name__}: {error}"
    watch.leave(why.partition("\n")[0][:200] if code else "", code)
    verdict = watch.verdict
    if verdict is None and said and (watch.settled.is_set() or not code):
        return  # JAX's own end waits for all, and all come to it
    if verdict is not None and verdict.culprit != watch.cluster.index:
        watch.say(verdict.words)
        code = code if said else LOST
    stop_now(code)
