"""Processes watch over each other: who has not come, who is gone, who is late.

The processes of these tests are threads of one, with connections as between machines; those of the
last tests are processes.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmjax.launch import watch as watches
from lmjax.launch.cluster import ProcessGroup
from lmjax.launch.lateness import Doing, Lateness, Limits, from_words, to_words
from lmjax.launch.watch import LOST, Verdict, Watch

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture
def company(monkeypatch):
    """Makes the watches of several processes; their ends are noted, and nothing ends."""
    for name, value in (("INTERVAL", 0.1), ("GRACE", 0.5), ("SILENCE", 1.5), ("WAITING", 0.5)):
        monkeypatch.setattr(watches, name, value)
    opened, said, ends = [], [], []
    monkeypatch.setattr(watches, "stop_now", ends.append)

    def make(count, *indices):
        address = f"localhost:{free_port()}"
        for index in indices or range(count):
            lines = []
            watch = Watch(ProcessGroup(address, count, index), lines.append)
            watch.me.host = f"host{index}"
            watch.open()
            opened.append(watch)
            said.append(lines)
        return opened, said, ends

    yield make
    for watch in opened:
        watch.close()


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def all_here(opened):
    wait_until(lambda: all(member.host for member in opened[0].members))
    wait_until(lambda: all(watch.members[0].host for watch in opened))


def test_a_process_that_is_gone_ends_all(company):
    opened, said, ends = company(3)
    all_here(opened)
    opened[2].report("training", "step", 7)
    wait_until(lambda: opened[0].members[2].channels)
    opened[2].close()  # as the system does for a process that is killed
    wait_until(lambda: len(ends) >= 2)
    expected = "The run ends: process 2 of 3 on host2 is gone, in step 7. The same command"
    for lines in said[:2]:
        assert lines[-1].startswith(expected)
    assert set(ends) == {LOST}


def test_the_others_notice_that_the_first_is_gone(company):
    opened, said, ends = company(3)
    all_here(opened)
    opened[0].close()
    wait_until(lambda: len(ends) >= 2)
    assert all("process 0 of 3 on host0 is gone" in lines[-1] for lines in said[1:])


def test_a_process_that_says_nothing_ends_all(company, monkeypatch):
    """A machine without power leaves its connections as they were."""
    opened, said, ends = company(2)
    all_here(opened)
    monkeypatch.setattr(opened[1], "_tell", lambda: None)
    wait_until(lambda: ends)
    assert "process 1 of 2 on host1 has said nothing for 2 s" in said[0][-1]


def test_a_process_that_failed_ends_all_but_lets_them_fail_alike(company):
    opened, _, ends = company(3)
    all_here(opened)
    began = time.monotonic()
    opened[1].leave("ValueError: a bug", 1)
    assert time.monotonic() - began >= 0.5  # others had time to come to the same
    assert opened[1].verdict == Verdict("process 1 of 3 on host1 has ended: ValueError: a bug", 1)
    wait_until(lambda: len(ends) >= 2)


def test_processes_that_end_by_themselves_wait_for_no_verdict(company):
    opened, said, ends = company(2)
    all_here(opened)
    opened[1].leave("", 0)
    opened[0].leave("see what it said", 2)
    assert opened[0].verdict is None and ends == [] and said == [[], []]


def test_it_is_said_who_has_not_come(company, monkeypatch):
    monkeypatch.setattr(watches, "COMING", 2.0)
    _, said, ends = company(4, 0, 2)
    wait_until(lambda: ends)
    first = said[0][0]
    assert re.match(r"Still waiting: processes 1, 3 of 4 have not come to localhost:\d+", first)
    assert "here is hosts host0, host2" in first
    assert said[0][-1].startswith("The run ends: processes 1, 3 of 4 have not come")


def test_where_no_connection_is_possible_the_run_goes_on(company):
    """JAX has its own way from process to process: without the watch a run is as it was before."""
    opened, said, ends = company(2, 0)
    opened[0].joined = True
    time.sleep(1.0)
    assert (said, ends) == ([[]], [])


def test_work_that_is_late_is_said_and_ends_the_run(company):
    opened, said, ends = company(3)
    all_here(opened)
    for watch in opened:
        watch.limits = Limits(factor=3.0, least=0.4, first=30.0, end_after=1.2)
        for step in (1, 2, 3):
            watch.report("training", "the batch of step", step, 0)
            watch.report("training", "step", step, 1)
        watch.report("training", "the batch of step", 4, 0)
    for watch in opened[:2]:
        watch.report("training", "step", 4, 1)
    wait_until(lambda: len(ends) == 3)
    words = r"step 4 has taken \d s \(usually \d.\d s at most\): 2 processes have come, not so "
    words += r"process 2 on host2 \(the batch of step 4\)"
    assert re.fullmatch(words, said[0][0])
    assert said[0][-1].startswith("The run ends: step 4 has taken")
    assert said[1][0] == said[0][-1]


def at(step, rank, seconds, what="step"):
    return {"training": Doing(what, step, rank, 100.0 - seconds)}


def test_limits_of_lateness():
    lateness = Lateness()
    limits = Limits(factor=10.0, least=60.0, first=1800.0)
    assert lateness.look([at(1, 1, 1000)] * 2, 100.0, limits) is None  # the first one compiles
    assert lateness.look([at(1, 1, 1801)] * 2, 100.0, limits) is not None
    lateness.took("training", Doing("step", 1, 1, -900.0), 100.0)
    assert lateness.look([at(1, 1, 1000)] * 2, 100.0, limits) is None  # it has said nothing yet
    lateness.took("training", Doing("step", 1, 1, 90.0), 100.0)
    assert lateness.look([at(2, 1, 99)] * 2, 100.0, limits) is None
    late = lateness.look([at(2, 1, 101)] * 2, 100.0, limits)
    assert late.come == (0, 1) and late.behind == () and late.usual == 10
    assert "all 2 processes at it have come" in late.words(["a", "b"])
    lateness.took("training", Doing("step", 1, 1, 99.9), 100.0)
    assert lateness.look([at(2, 1, 101)] * 2, 100.0, limits).usual == 10
    quick = Lateness()
    quick.took("training", Doing("step", 1, 1, 99.9), 100.0)
    quick.took("training", Doing("step", 1, 1, 99.9), 100.0)
    assert quick.look([at(2, 1, 59)], 100.0, limits) is None
    assert quick.look([{}, {}], 100.0, limits) is None


def test_a_save_may_be_late_beside_the_training():
    """Processes that have done with it are not behind."""
    saving = {"saving": Doing("the checkpoint of step", 10, 0, 0.0)}
    late = Lateness().look([at(12, 1, 1), at(12, 1, 1) | saving], 2000.0, Limits(end_after=None))
    assert late.come == (1,) and late.behind == ()
    assert late.doing.named() == "the checkpoint of step 10"


def test_what_a_process_does_travels_with_its_seconds():
    """Clocks of machines differ."""
    doing = Doing("step", 3, 1, time.monotonic() - 5)
    [found] = from_words(to_words({"training": doing}, time.monotonic() + 2)).values()
    assert (found.what, found.step, found.rank) == ("step", 3, 1)
    assert found.since == pytest.approx(doing.since - 2, abs=0.5)


PROGRAM = """
import sys, time
import numpy as np
from lmjax.config import UserError, config
from lmjax.launch import run, watch

watch.GRACE = 3.0

@config
class Program:
    do: str = "wait"  # what to do

    def run(self) -> None:
        import jax
        from jax.experimental import multihost_utils
        watch.SILENCE = 8.0
        for number in range(100000):
            multihost_utils.process_allgather(np.int32(number))
            if number == 3:
                print("together", flush=True)
            if number == 30 and self.do == "bug" and jax.process_index() == 1:
                raise ValueError("a bug")
            if number == 30 and self.do == "mistake" and jax.process_index() == 1:
                raise UserError("the disk is full")
            if number == 30 and self.do == "mistakes":
                raise UserError("a setting is wrong")
            time.sleep(0.01)

if __name__ == "__main__":
    run(Program())
"""


@pytest.fixture
def pair(tmp_path):
    """Starts the program in two processes, and waits until they are at work."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def start(*arguments):
        address = f"localhost:{free_port()}"
        for index in range(2):
            several = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "program", *arguments],
                    cwd=tmp_path,
                    env={**os.environ, **own, **several},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            process.stdout.readline()
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end_of(process) -> tuple[int, str]:
    """Exit code and stderr of a process that ends within a minute."""
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_killing_one_ends_the_other_within_a_minute(pair):
    """With a message that says which one, and a code that says that a restart may help."""
    first, second = pair()
    second.kill()
    code, err = end_of(first)
    assert code == LOST
    assert re.search(r"The run ends: process 1 of 2 on \S+ is gone", err)


@pytest.mark.slow
def test_killing_the_first_ends_the_other(pair):
    """JAX's client aborts a process that has lost its coordinator; either of both may be faster."""
    first, second = pair()
    first.kill()
    code, err = end_of(second)
    assert code in (LOST, -signal.SIGABRT)
    assert "process 0 of 2" in err or "leader task" in err


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_other(pair):
    """Its connections stay open."""
    first, second = pair()
    second.send_signal(signal.SIGSTOP)
    code, err = end_of(first)
    assert code == LOST and "process 1 of 2" in err and "has said nothing for 8 s" in err


@pytest.mark.slow
def test_a_bug_of_one_ends_the_other(pair):
    first, second = pair("do=bug")
    assert end_of(second)[0] == 1
    code, err = end_of(first)
    assert code == LOST and "has ended: ValueError: a bug" in err


@pytest.mark.slow
@pytest.mark.parametrize(("do", "codes"), [("mistake", [LOST, 2]), ("mistakes", [2, 2])])
def test_a_mistake_of_one_ends_the_other(pair, do, codes):
    processes = pair(f"do={do}")
    assert [end_of(process)[0] for process in processes] == codes
