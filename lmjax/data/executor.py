"""A parallel map over items that can be resumed: a folder for each, made once."""

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
    workers: int = 0,
    progress: Progress = silent,
    doing: str = "working",
    size: Callable[[Item], int] = lambda item: 1,
) -> list[pathlib.Path]:
    """Makes a folder of each item, except of those that a former call has finished.

    A folder appears, complete, by one renaming, so that any number of interruptions, also by a
    kill, leave whole folders or none. The first error stops the work: items that are being made
    are finished, further ones are not begun. Workers are spawned processes that leave with this
    one, and Ctrl-C is heard by this one alone.

    Args:
        make: writes what is made of an item into an empty folder: (item, folder, context).
        items: the same ones in the same order in every call with this folder.
        work: where the folders lie, which exists.
        start: gives what `make` needs besides, once in each process; with workers it must pickle,
            as `make` and the items must.
        workers: processes; 0 is this one.
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
    run = functools.partial(_in_processes, workers, doing) if workers else _in_this_process
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
    workers: int,
    doing: str,
    make: Make,
    missing: list[tuple[Any, pathlib.Path]],
    start: Callable[[], Any],
) -> Iterator[Any]:
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(missing)),
        # Not fork: jax may be running threads in this process.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(start,),
    )
    try:
        futures = {pool.submit(_make_in_worker, make, *pair): pair[0] for pair in missing}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            yield futures[future]
    except concurrent.futures.process.BrokenProcessPool:
        raise WorkerDied(
            f"a process that was {doing} has died; the system kills one when memory runs out. What "
            "is finished is kept: give the same command again, with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_start: Callable[[], Any] | None = None  # of a worker process


@functools.cache
def _context() -> Any:
    """Result of `start` in a worker; made with its first item, whose error is told."""
    return _start()


def _start_worker(start: Callable[[], Any]) -> None:
    global _start
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and shuts the pool down

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _start = start


def _make_in_worker(make: Make, item: Any, folder: pathlib.Path) -> None:
    _make_folder(make, item, folder, _context())


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
