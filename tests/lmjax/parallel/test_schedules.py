"""Pipeline schedules: every unit of work once and in order, ticks by formula, memory in bounds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.parallel import schedules
from lmjax.parallel.schedules import Unit, Work, schedule, timed
from lmjax.parallel.show_schedule import describe, main

NAMES = schedules.Name.__args__
sizes = st.tuples(st.sampled_from(NAMES), st.integers(1, 6), st.integers(0, 9), st.integers(1, 3))


def made_of(name: str, stages: int, more: int, chunks: int) -> schedules.PipelineSchedule:
    """A schedule of so many microbatches more than stages, or that multiple of them."""
    multiple = name in ("interleaved", "zb_v")
    microbatches = stages * (1 + more // 3) if multiple else stages + more
    return schedule(name, stages, microbatches, chunks)


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_every_unit_is_done_once_on_its_stage_after_what_it_needs(size):
    made = made_of(*size)
    parts, when = len(made.holder), {}
    for tick, row in enumerate(made.ticks):
        assert len(row) == made.stages
        for stage, units in enumerate(row):
            assert len({unit.work for unit in units}) == len(units)
            for order, unit in enumerate(units):
                assert unit not in when
                assert made.holder[unit.part] == stage
                when[unit] = tick + order / 10
    kinds = [Work.FORWARD, Work.BACKWARD] + [Work.WEIGHTS] * made.split
    everything = itertools.product(kinds, range(parts), range(made.microbatches))
    assert when.keys() == {Unit(*unit) for unit in everything}
    for (work, part, m), tick in when.items():
        if work is Work.FORWARD and part:
            assert int(when[Unit(Work.FORWARD, part - 1, m)]) < int(tick)
        if work is Work.BACKWARD:
            assert when[Unit(Work.FORWARD, part, m)] < tick
            if part < parts - 1:
                assert int(when[Unit(Work.BACKWARD, part + 1, m)]) < int(tick)
        if work is Work.WEIGHTS:
            assert when[Unit(Work.BACKWARD, part, m)] < tick


times = st.tuples(*[st.floats(0.1, 3.0)] * 3)


@settings(max_examples=100, deadline=None)
@given(sizes, times)
def test_a_step_lasts_as_long_as_the_formulas_say(size, times):
    made = made_of(*size)
    p, n, v = made.stages, made.microbatches, made.chunks
    if made.name == "zb_h1":
        assert len(made.ticks) == 3 * n + p - 1 == made.duration(1.0, 1.0, 1.0)
    elif made.name == "zb_v":
        assert len(made.ticks) == 6 * n + p - 1 == made.duration(1.0, 1.0, 1.0)
    else:
        ticks = 2 * (n + p - 1) if made.name == "gpipe" else n * v + p * v + p - 2
        assert len(made.ticks) == ticks
        assert made.duration(*times) == pytest.approx((n * v + p - 1) * sum(times))


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_held_activations_are_bounded(size):
    made = made_of(*size)
    p, v = made.stages, made.chunks
    if made.name == "gpipe":
        assert made.live == (made.microbatches,) * p
    elif made.name in ("1f1b", "interleaved"):
        bounds = [p * v + p - 1 - 2 * stage for stage in range(p)]
        assert made.live == tuple(min(made.microbatches * v, bound) for bound in bounds)
    else:
        assert max(made.waiting) <= max(made.live) <= p * v


def test_bubbles_grow_smaller():
    """Of 4 stages and 8 microbatches."""
    lost = {name: schedule(name, 4, 8).bubble() for name in NAMES}
    assert lost["zb_v"] < lost["zb_h1"] < lost["interleaved"] < lost["1f1b"]
    assert lost["1f1b"] == lost["gpipe"] == pytest.approx(3 / 11)  # (p - 1) / (n + p - 1)
    assert lost["interleaved"] == pytest.approx(3 / 19)
    assert lost["zb_h1"] == pytest.approx(3 / 27)
    assert lost["zb_v"] == pytest.approx(3 / 51)


def test_orders_that_wait_for_each_other_are_refused():
    orders = [[Unit(Work.BACKWARD, 0, 0), Unit(Work.FORWARD, 0, 0)], []]
    with pytest.raises(ValueError, match="every stage waits for another at tick 0"):
        timed("gpipe", 1, orders, (0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 4), "2f2b"),
        (("gpipe", 0, 4), "0 stages"),
        (("1f1b", 4, 3), "3 microbatches for 4 stages: give at least as many"),
        (("interleaved", 4, 6), "6 microbatches are no multiple of 4 stages"),
        (("interleaved", 4, 8, 0), "0 chunks: must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    # TypeError is the check of types in the tests, which notices the unknown name first.
    with pytest.raises((UserError, TypeError), match=message):
        schedule(*arguments)


def test_the_command_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / "schedule.png"
    main(["name=zb_h1", "stages=2", "microbatches=3", f"picture={picture}"])
    printed = capsys.readouterr().out
    assert "stage 0  f0 f1 .  b0 w0 f2 b1 w1 b2 w2\n" in printed
    assert "stage 1  .  f0 b0 f1 b1 w0 f2 b2 w1 w2\n" in printed
    assert "ticks       10\nbubble      10.0% of a step" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_descriptions_show_the_ticks():
    """Two stages, by hand: in the middle every tick has one forward and one backward."""
    lines = describe(schedule("1f1b", 2, 3), 1.0, 1.0, 1.0).splitlines()
    assert lines[0].split() == ["stage", "0", "f0", "f1", "f2b0", "b1", "b2"]
    assert lines[1].split() == ["stage", "1", ".", "f0b0", "f1b1", "f2b2", "."]
    lines = describe(schedule("interleaved", 2, 2, 2), 1.0, 1.0, 1.0).splitlines()
    assert lines[0].split()[2:] == ["f0", "f1", "F0", "F1", "B0", "B1", "b0", "b1"]
    assert lines[1].split()[2:] == [".", "f0", "f1", "F0B0", "F1B1", "b0", "b1", "."]
    assert "each of 1/2 of a stage" in lines[-1]
