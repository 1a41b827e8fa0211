"""The parallel map: each item once, whole folders only, whatever stops it, and going on."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lmjax.config import UserError
from lmjax.data.executor import WorkerDied, WorkerPool, map_items

ITEMS = list(range(10, 22))


def count(item, folder, step):
    """Writes the item's multiple, and says that it was done, beside the folder."""
    (folder / "product.json").write_text(json.dumps(item * step))
    with open(folder.parent / "done.txt", "a") as file:
        file.write(f"{item}\n")


def three():
    return 3


def no_start():
    raise UserError("there is nothing to begin with")


def fails_at_15(item, folder, step):
    if item == 15:
        (folder / "half").write_text("")
        raise UserError("15 is not as it should be")
    count(item, folder, step)


def dies_at_15(item, folder, step):
    if item == 15:
        (folder / "half").write_text("")
        while not (folder.parent / "shard-000001").exists():  # something has been finished
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    count(item, folder, step)


def done(work):
    """The items that were made, each as often as it was."""
    path = work / "done.txt"
    return sorted(map(int, path.read_text().split())) if path.exists() else []


def products(work):
    """What the finished folders hold, by item."""
    return {
        ITEMS[int(path.name[-6:])]: json.loads((path / "product.json").read_text())
        for path in work.glob("shard-??????")
    }


ALL = {item: 3 * item for item in ITEMS}


@pytest.mark.parametrize("workers", [0, 3])
def test_every_item_is_made_once_and_its_folders_are_in_order(tmp_path, workers):
    told = []
    arguments = dict(
        work=tmp_path,
        start=three,
        workers=workers,
        progress=lambda *given: told.append(given),
        doing="counting",
        size=lambda item: item,
    )
    folders = map_items(count, ITEMS, **arguments)
    assert [json.loads((f / "product.json").read_text()) for f in folders] == [*ALL.values()]
    assert done(tmp_path) == ITEMS
    assert told[0] == ("counting", 0, sum(ITEMS)) and told[-1] == ("counting", *[sum(ITEMS)] * 2)
    assert sorted(n - m for (_, m, _), (_, n, _) in itertools.pairwise(told)) == ITEMS
    # Nothing is made again, and no worker begins.
    del told[:]
    assert map_items(fails_at_15, ITEMS, **arguments | {"start": no_start}) == folders
    assert done(tmp_path) == ITEMS and told == [("counting", *[sum(ITEMS)] * 2)]


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_is_raised_as_it_is_and_what_is_finished_stays(tmp_path, workers):
    with pytest.raises(UserError, match="15 is not as it should be"):
        map_items(fails_at_15, ITEMS, tmp_path, three, workers)
    assert not list(tmp_path.glob("*.tmp"))
    finished = products(tmp_path)
    assert 15 not in finished and finished.items() <= ALL.items()
    if not workers:
        assert [*sorted(finished)] == ITEMS[:5]
    map_items(count, ITEMS, tmp_path, three, workers)
    assert products(tmp_path) == ALL and done(tmp_path) == ITEMS


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_at_the_beginning_of_a_process_is_told(tmp_path, workers):
    with pytest.raises(UserError, match="nothing to begin with"):
        map_items(count, ITEMS, tmp_path, no_start, workers)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_dies_is_told_and_another_call_goes_on(tmp_path):
    with pytest.raises(WorkerDied, match=r"a process that was counting has died.*fewer workers"):
        map_items(dies_at_15, ITEMS, tmp_path, three, 2, doing="counting")
    finished = products(tmp_path)
    assert finished and 15 not in finished and finished.items() <= ALL.items()
    assert (tmp_path / "shard-000005.tmp").exists()  # a kill cannot be cleaned up after
    map_items(count, ITEMS, tmp_path, three, 2)
    assert products(tmp_path) == ALL and not list(tmp_path.glob("*.tmp"))
    assert set(finished) <= set(done(tmp_path)) and len(done(tmp_path)) <= len(ITEMS) + 1
    assert not [*tmp_path.rglob("half")]


SCRIPT = """
import os, pathlib, signal, sys, time
from lmjax.data.executor import map_items
from tests.lmjax.data.test_executor import ITEMS, count, three

def slowly(item, folder, step):
    time.sleep(0.05)
    count(item, folder, step)

def progress(what, done, total):
    if done >= 4:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of shells ignore it
    map_items(slowly, ITEMS, pathlib.Path(sys.argv[1]), three, int(sys.argv[3]), progress)
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_goes_on_after_a_kill_and_after_ctrl_c(tmp_path, name, workers):
    path, work = tmp_path / "script.py", tmp_path / "work"
    path.write_text(SCRIPT)
    work.mkdir()
    # Returns only when every process that inherited the pipes has ended: no worker is left behind.
    stopped = subprocess.run(
        [sys.executable, str(path), str(work), name, str(workers)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert stopped.returncode == -getattr(signal, name), stopped.stderr
    finished = products(work)
    assert 4 <= len(finished) < len(ITEMS) and finished.items() <= ALL.items()
    if name == "SIGINT":
        assert not list(work.glob("*.tmp"))
        assert stopped.stderr.count("Traceback") == 1  # the parent's alone
    map_items(count, ITEMS, work, three, workers)
    assert products(work) == ALL
    # At most what was begun and not finished is done again.
    assert len(done(work)) <= len(ITEMS) + 2 * (name == "SIGKILL") and set(done(work)) == {*ITEMS}


def note_process(item, folder, context):
    (folder / "process.json").write_text(json.dumps([os.getpid(), context]))


def four():
    return 4


def test_the_processes_of_a_pool_do_several_calls(tmp_path):
    """Each call has its own context, and none begins a further process."""
    found = []
    with WorkerPool(2) as pool:
        for name, start in (("one", three), ("two", four), ("three", three)):
            (tmp_path / name).mkdir()
            folders = map_items(note_process, ITEMS, tmp_path / name, start, pool)
            found.append([json.loads((f / "process.json").read_text()) for f in folders])
    assert [{context for _, context in each} for each in found] == [{3}, {4}, {3}]
    processes = {process for each in found for process, _ in each}
    assert len(processes) <= 2 and os.getpid() not in processes
