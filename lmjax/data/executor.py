"""A parallel map over items that can be resumed: a folder for each, made once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lmjax.config import UserError
from lmjax.data.documents import Progress, silent

Item = TypeVar("Item")
Context = TypeVar("Context")
Make = Callable[[Item, pathlib.Path, Context], None]
UNFINISHED = ".tmp"  # behind the name of a folder that is being written


class WorkerDied(UserError):
    """A worker process has ended before its item was finished."""


def map_items(
    make: Make[Item, Context],
    items: Sequence[Item],
    work: pathlib.Path,
    start: Callable[[], Context],
    workers: int | WorkerPool = 0,
    progress: Progress = silent,
    doing: str = "working",
    size: Callable[[Item], int] = lambda item: 1,
) -> list[pathlib.Path]:
    """Makes a folder of each item, except of those that a former call has finished.

    A folder appears, complete, by one renaming, so that any number of interruptions, also by a
    kill, leave whole folders or none. The first error stops the work: items that are being made
    are finished, further ones are not begun.

    Args:
        make: writes what is made of an item into an empty folder: (item, folder, context).
        items: the same ones in the same order in every call with this folder.
        work: where the folders lie, which exists.
        start: gives what `make` needs besides, once in each process; with workers it must pickle,
            as `make` and the items must.
        workers: processes, or a pool of them; 0 is this one.
        progress: is told the sizes of items that are finished, and of all.
        doing: name of the work, for `progress` and in errors.
        size: of an item.

    Returns:
        The folders in the order of the items.

    Raises:
        WorkerDied: a process was killed; what is finished stays.
    """
    folders = [work / f"shard-{number:06d}" for number in range(len(items))]
    missing = [
        (item, folder) for item, folder in zip(items, folders, strict=True) if not folder.exists()
    ]
    total = sum(map(size, items))
    done = total - sum(size(item) for item, _ in missing)
    progress(doing, done, total)
    with contextlib.ExitStack() as stack:
        pool = workers
        if not isinstance(pool, WorkerPool):
            pool = stack.enter_context(WorkerPool(min(pool, len(missing))))
        alone = not pool.workers
        run = _in_this_process if alone else functools.partial(_in_processes, pool, doing)
        for item in run(make, missing, start) if missing else ():
            done += size(item)
            progress(doing, done, total)
    return folders


def _in_this_process(
    make: Make, missing: list[tuple[Any, pathlib.Path]], start: Callable[[], Any]
) -> Iterator[Any]:
    context = start()
    for item, folder in missing:
        _make_folder(make, item, folder, context)
        yield item


def _in_processes(
    pool: WorkerPool,
    doing: str,
    make: Make,
    missing: list[tuple[Any, pathlib.Path]],
    start: Callable[[], Any],
) -> Iterator[Any]:
    call, futures = pool.number_call(), {}
    try:
        for pair in missing:
            futures[pool.submit(_make_in_worker, make, *pair, call, start)] = pair[0]
        for future in concurrent.futures.as_completed(futures):
            future.result()
            yield futures[future]
    except concurrent.futures.process.BrokenProcessPool:
        raise WorkerDied(
            f"a process that was {doing} has died; the system kills one when memory runs out. What "
            "is finished is kept: give the same command again, with fewer workers"
        ) from None
    finally:
        for future in futures:
            future.cancel()
        concurrent.futures.wait(futures)


class WorkerPool:
    """Worker processes for several calls of `map_items`: each begins once, when there is work.

    They are spawned processes that leave with this one, and Ctrl-C is heard by this one alone.
    """

    def __init__(self, workers: int) -> None:
        """So many processes; 0: none, the work is done in this one."""
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._calls = 0

    def number_call(self) -> int:
        """A number for a further call, by which processes know what they have begun with."""
        self._calls += 1
        return self._calls

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def submit(self, work: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """Lets a process do some work."""
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers,
                # Not fork: jax may be running threads in this process.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
            )
        return self._pool.submit(work, *arguments)


_contexts: dict[int, Any] = {}  # of a worker process, for the call that it works on


def _context(call: int, start: Callable[[], Any]) -> Any:
    """Result of `start` in a worker; made with its first item of a call, whose error is told."""
    if call not in _contexts:
        _contexts.clear()
        _contexts[call] = start()
    return _contexts[call]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and shuts the pool down

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _make_in_worker(
    make: Make, item: Any, folder: pathlib.Path, call: int, start: Callable[[], Any]
) -> None:
    _make_folder(make, item, folder, _context(call, start))


def _make_folder(make: Make, item: Any, folder: pathlib.Path, context: Any) -> None:
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    try:
        make(item, unfinished, context)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.replace(folder)
