"""Batches are the same for any number of hosts and workers and from any step; loaders end."""

import dataclasses
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.data.loader import Loader
from lmjax.data.mixture import Mixture
from lmjax.data.plan import make_plan
from lmjax.data.rows import Ring
from lmjax.data.sources import TextFiles
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import ByteTokenizer


def prepare(tokens, segments, seeds):
    return {"tokens": tokens, "segments": segments, "seeds": seeds}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    stores = {}
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("\n\n".join(f"{name} {n}" * 9 for n in range(200)))
        source = TextFiles(path=str(folder / f"{name}.txt"), split="paragraph")
        stores[name] = build_stores(source, ByteTokenizer(), folder / name)["all"]
    readers = {name: Ring(store, 33) for name, store in stores.items()}
    return Mixture(readers, {"one": 0.6, "two": 0.4})


@pytest.fixture
def loader(mixture):
    return Loader(make_plan(3, 8, ((5, 12),)), mixture, prepare)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_make_the_whole_batch(loader, hosts):
    for step in (0, 4, 5, 100):
        parts = [
            dataclasses.replace(loader, host_index=host, host_count=hosts).batch(step)
            for host in range(hosts)
        ]
        whole = loader.batch(step)
        assert_equal(
            {name: np.concatenate([part[name] for part in parts]) for name in whole}, whole
        )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_first_step_make_no_difference(loader, workers):
    for first in (3,) if workers else (0, 3, 1000):
        with dataclasses.replace(loader, workers=workers).iterate(first) as batches:
            for expected in range(first, first + 6):
                step, batch = next(batches)
                assert step == expected
                assert_equal(batch, loader.batch(step))


def test_batch_sizes_change_and_the_rows_go_on(loader, mixture):
    steady = Loader(make_plan(3, 4), mixture, prepare)
    rows = [loader.batch(step) for step in range(8)]
    assert [len(batch["tokens"]) for batch in rows] == [8] * 5 + [12] * 3
    others = [steady.batch(step) for step in range(19)]
    for name in ("tokens", "segments", "seeds"):
        assert np.array_equal(
            np.concatenate([batch[name] for batch in rows]),
            np.concatenate([batch[name] for batch in others]),
        )


def test_seeds_differ_by_row_and_run(loader, mixture):
    seeds = np.concatenate([loader.batch(step)["seeds"] for step in range(30)])
    assert seeds.dtype == np.uint64 and len(np.unique(seeds)) == len(seeds)
    other = Loader(make_plan(4, 8), mixture, prepare).batch(0)
    assert not np.isin(other["seeds"], seeds).any()


def test_skipped_rows_are_never_read(loader):
    skipping = dataclasses.replace(loader, plan=loader.plan.skipping(2, 3))
    assert_equal(skipping.batch(1), loader.batch(1))
    assert_equal(skipping.batch(2), loader.batch(4))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_the_background_is_raised(loader, mixture, workers):
    wrong = Loader(loader.plan, mixture, no_batch, workers=workers)
    batches = wrong.iterate(0)
    with pytest.raises(RuntimeError, match="no batch today"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def no_batch(tokens, segments, seeds):
    raise RuntimeError("no batch today")


def test_errors_come_in_their_turn(loader, mixture):
    first = loader.batch(2)["seeds"][0]

    def third_fails(tokens, segments, seeds):
        if seeds[0] == first:
            raise RuntimeError("the third")
        return prepare(tokens, segments, seeds)

    with Loader(loader.plan, mixture, third_fails).iterate() as batches:
        assert [next(batches)[0], next(batches)[0]] == [0, 1]
        with pytest.raises(RuntimeError, match="the third"):
            next(batches)


def test_closing_ends_the_thread(loader):
    before = threading.active_count()
    for taken in (0, 1, 5):
        batches = loader.iterate()
        for _ in range(taken):
            next(batches)
        batches.close()
        batches.close()
        assert threading.active_count() == before
    batches = loader.iterate()
    next(batches)
    del batches  # forgotten
    assert threading.active_count() == before


SCRIPT = """
import sys
import numpy as np
from lmjax.data import Loader, Mixture, Ring, TokenStore, make_plan

def prepare(tokens, segments, seeds):
    return {"tokens": tokens, "large": np.zeros((64, 1024))}

if __name__ == "__main__":
    mixture = Mixture({"one": Ring(TokenStore(sys.argv[1]), 33)}, {"one": 1.0})
    closed, forgotten = (Loader(make_plan(0, 8), mixture, prepare, workers=1).iterate(step)
                         for step in (0, 7))
    kept = [next(batches) for batches in (closed, forgotten, closed)]
    closed.close()
    print([step for step, batch in kept])
"""


@pytest.mark.slow
def test_a_program_with_workers_ends_quietly(mixture, tmp_path):
    """No complaint about leaked shared memory, no process left behind."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    folder = str(mixture._sources[0].store.folder)
    # Returns only when every process that inherited the pipes has ended.
    done = subprocess.run(
        [sys.executable, str(path), folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 7, 1]\n", "")


def test_batches_that_are_to_come_must_divide_among_hosts(loader):
    with pytest.raises(UserError, match="8 rows does not divide among 3 hosts"):
        dataclasses.replace(loader, host_count=3).iterate()
    with pytest.raises(UserError, match="12 rows does not divide among 8 hosts"):
        dataclasses.replace(loader, host_count=8).iterate()
    with dataclasses.replace(loader, host_count=3).iterate(5) as batches:  # 12 rows from there on
        assert next(batches)[0] == 5
