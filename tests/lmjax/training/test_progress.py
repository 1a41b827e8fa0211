"""The progress line and the clock, with a clock and a console of the test's own."""

import io

import pytest
from rich.console import Console

from lmjax.console import duration
from lmjax.training.progress import Clock, Progress


class Now:
    """A clock that a test moves."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def test_the_clock_leaves_pauses_out():
    now = Now()
    clock = Clock(now)
    now.time = 3.0
    with clock.paused():
        now.time = 10.0
        with clock.paused():
            now.time = 11.0
    now.time = 13.0
    assert clock.seconds() == 5.0
    with clock.paused(when=False):
        now.time = 14.0
    assert clock.seconds() == 6.0


def test_the_clock_goes_on_after_an_error_in_a_pause():
    now = Now()
    clock = Clock(now)
    with pytest.raises(KeyError), clock.paused():
        now.time = 4.0
        raise KeyError
    now.time = 5.0
    assert clock.seconds() == 1.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60.0, "1 min 00 s"),
        (3599.0, "59 min 59 s"),
        (7800.0, "2 h 10 min"),
        (97200.0, "1 d 3 h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def lines_of(steps, done=0):
    """What a run prints where there is no terminal: a step a second, 100 tokens each."""
    console = Console(file=io.StringIO(), width=120)
    with Progress(done, steps, console) as progress:
        for step in range(done + 1, steps + 1):
            progress.update(step, 1 / step, 100.0, float(step))
    return console.file.getvalue().splitlines()


def test_plain_lines_say_step_loss_speed_and_time_left():
    lines = lines_of(4)
    assert lines[0].split() == ["step", "1/4", "loss", "1.0000"]
    assert " ".join(lines[1].split()) == "step 2/4 loss 0.5000 100 tokens/s 2 s left"
    assert " ".join(lines[3].split()) == "step 4/4 loss 0.2500 100 tokens/s 0 s left"


def test_plain_lines_are_few_and_hold_the_last_step():
    lines = lines_of(10_000, done=5_000)
    assert 40 <= len(lines) <= 43
    assert "5,001/10,000" in lines[0]
    assert "10,000/10,000" in lines[-1]


def test_a_terminal_gets_one_line_that_goes_away():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, _environ={})
    with Progress(0, 2, console) as progress:
        progress.update(1, 2.0, 10.0, 1.0)
        progress.say("evaluated")
        progress.update(2, 1.0, 10.0, 2.0)
    assert "step 2" in console.file.getvalue()
    assert "10 tokens/s" in console.file.getvalue()
    assert "evaluated" in console.file.getvalue()
