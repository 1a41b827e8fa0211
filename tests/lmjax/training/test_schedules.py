"""Learning-rate schedules against their formulas in plain Python, and their general properties."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.training.schedules import (
    Constant,
    Cosine,
    InverseSquareRoot,
    Linear,
    Restarts,
    WarmupStableDecay,
    count_full_batches,
)

# float32 arithmetic against Python's float64.
TOLERANCE = 2e-6


def values(schedule, steps, length=None):
    """The learning rate of every step of a run."""
    return np.asarray(jax.jit(schedule.build(steps))(np.arange(length or steps)))


def expected(rate, steps):
    """The same from a Python function of the update's number t = 1, 2, ..."""
    return np.array([rate(t) for t in range(1, steps + 1)])


def test_warm_up_counts_updates_from_one():
    got = values(Constant(peak=0.001, warmup=3), 12)
    np.testing.assert_allclose(got, expected(lambda t: 0.001 * min(1, t / 3), 12), rtol=TOLERANCE)


def test_cosine():
    def rate(t):
        if t <= 5:
            return 0.5 * t / 5
        return 0.05 + 0.45 * (1 + math.cos(math.pi * (t - 5) / 35)) / 2

    got = values(Cosine(peak=0.5, warmup=5, final=0.1), 40)
    np.testing.assert_allclose(got, expected(rate, 40), rtol=TOLERANCE)


def test_linear():
    def rate(t):
        return 2.0 * t / 4 if t <= 4 else 2.0 - (2.0 - 0.5) * (t - 4) / 16

    got = values(Linear(peak=2.0, warmup=4, final=0.25), 20)
    np.testing.assert_allclose(got, expected(rate, 20), rtol=TOLERANCE)


@pytest.mark.parametrize("length", [25, 60], ids=["cut short", "goes on"])
@pytest.mark.parametrize(
    "make, fall",
    [(Cosine, lambda u: (1 - math.cos(math.pi * u)) / 2), (Linear, lambda u: u)],
)
def test_a_fall_that_ends_before_or_after_the_run(make, fall, length):
    """GPT-3's rate stays at a tenth after its cosine; BLOOM's run ended before its own did."""

    def rate(t):
        return 2.0 * t / 4 if t <= 4 else 2.0 - 1.8 * fall(min(1, (t - 4) / 36))

    got = values(make(peak=2.0, warmup=4, final=0.1, end=40), length)
    # float32 near the end of the fall, where 1.8 is taken from 2.0
    np.testing.assert_allclose(got, expected(rate, length), rtol=2e-5)


@settings(max_examples=25)
@given(st.data())
def test_counting_full_batches_keeps_a_schedule_in_tokens(data):
    """Whatever the growth of the batch, the rate is the schedule's at the share of rows trained."""
    sizes = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    rows = np.repeat(sizes, lengths)  # of each step
    table = tuple(zip(np.cumsum([0, *lengths[:-1]]).tolist(), sizes, strict=True))
    full, done = sizes[-1], np.cumsum(rows)
    schedule = Linear(peak=1.0, warmup=3, end=20)
    got = jax.jit(count_full_batches(schedule.build(100), table))(np.arange(len(rows)))

    def rate(t):
        return t / 3 if t <= 3 else max(0.0, 1 - (t - 3) / 17)

    np.testing.assert_allclose(got, [rate(d / full) for d in done], atol=TOLERANCE)


def test_inverse_square_root_of_t5_and_of_the_transformer():
    flat = values(InverseSquareRoot(peak=0.01, warmup=0, start=10), 50)
    np.testing.assert_allclose(
        flat, expected(lambda t: 0.01 * math.sqrt(10 / max(t, 10)), 50), rtol=TOLERANCE
    )
    # width^-0.5 * min(t^-0.5, t * warmup^-1.5), the formula of arXiv 1706.03762
    width, warmup = 64, 8
    peak = (width * warmup) ** -0.5
    noam = values(InverseSquareRoot(peak=peak, warmup=warmup, start=1), 50)
    np.testing.assert_allclose(
        noam,
        expected(lambda t: width**-0.5 * min(t**-0.5, t * warmup**-1.5), 50),
        rtol=TOLERANCE,
    )


@pytest.mark.parametrize(
    "shape, fall",
    [
        ("linear", lambda u: u),
        ("cosine", lambda u: (1 - math.cos(math.pi * u)) / 2),
        ("sqrt", math.sqrt),
    ],
)
def test_warmup_stable_decay(shape, fall):
    def rate(t):
        if t <= 4:
            return 3.0 * t / 4
        return 3.0 - (3.0 - 0.3) * fall(max(0, t - 30) / 10)

    schedule = WarmupStableDecay(peak=3.0, warmup=4, decay=0.25, final=0.1, shape=shape)
    np.testing.assert_allclose(values(schedule, 40), expected(rate, 40), rtol=TOLERANCE)


@st.composite
def schedules(draw):
    """A schedule of any kind, and a run that it fits into."""
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps))
    common = {"peak": draw(st.floats(1e-6, 10)), "warmup": warmup}
    final = draw(st.floats(0, 1))
    room = 1 - warmup / steps
    return draw(
        st.sampled_from(
            [
                Constant(**common),
                Cosine(**common, final=final),
                Linear(**common, final=final),
                InverseSquareRoot(**common, start=draw(st.integers(1, 400))),
                WarmupStableDecay(
                    **common,
                    final=final,
                    decay=draw(st.floats(0, 1)) * max(0, room - 1 / steps),
                    shape=draw(st.sampled_from(["linear", "cosine"])),
                ),
            ]
        )
    ), steps


@settings(max_examples=15)
@given(schedules())
def test_every_schedule_rises_then_falls_without_jumps_and_ends_where_it_says(case):
    schedule, steps = case
    rate = values(schedule, steps, length=steps + 5)
    peak, warmup = schedule.peak, schedule.warmup
    assert np.all(rate > -1e-7 * peak) and np.all(rate <= peak * (1 + TOLERANCE))
    assert np.all(np.diff(rate[:warmup]) > 0)
    assert np.all(np.diff(rate[max(warmup - 1, 0) :]) <= peak * TOLERANCE)
    # The steepest thing a schedule may do is fall to `final` in one step when it is all decay;
    # half a cosine is pi / 2 times as steep as a line.
    begin = warmup
    if isinstance(schedule, WarmupStableDecay):
        begin = steps - round(schedule.decay * steps)
    steepest = max(1 / max(warmup, 1), math.pi / 2 / max(steps - begin, 1))
    if isinstance(schedule, InverseSquareRoot):
        steepest = max(1 / max(warmup, 1), 1 / max(schedule.start, warmup))
    assert np.all(np.abs(np.diff(rate)) <= peak * (steepest + TOLERANCE))
    if hasattr(schedule, "final") and steps > begin:
        np.testing.assert_allclose(rate[steps - 1 :], peak * schedule.final, atol=peak * TOLERANCE)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Cosine(warmup=100).build(50), "longer than the run of 50 steps"),
        (lambda: Constant(warmup=2).build(1), "longer than the run of 1 steps"),
        (lambda: Cosine(peak=0.0), "above 0"),
        (lambda: Linear(warmup=-1), "0 or more"),
        (lambda: Cosine(final=1.5), "between 0 and 1"),
        (lambda: WarmupStableDecay(decay=-0.1), "between 0 and 1"),
        (lambda: WarmupStableDecay(warmup=90, decay=0.2).build(100), "overlap"),
        (lambda: InverseSquareRoot(start=0), "counted from 1"),
        (lambda: Cosine(warmup=10, end=10), "Cosine.end=10: the fall begins after the warmup=10"),
        (lambda: Linear(warmup=0).build(0), "1 or more"),
    ],
)
def test_a_schedule_that_cannot_be_says_why(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_a_schedule_begins_anew():
    """Each stretch is a run of its own: against the schedule built for it alone."""
    inner = Cosine(peak=3e-3, warmup=3, final=0.1)
    rate = values(Restarts(schedule=inner, first_steps=(10, 25)), 40)
    for first, end in ((0, 10), (10, 25), (25, 40)):
        alone = values(inner, end - first)
        np.testing.assert_allclose(rate[first:end], alone, rtol=TOLERANCE)
    assert rate[9] == pytest.approx(3e-4) and rate[10] == pytest.approx(1e-3)
    with pytest.raises(UserError, match="the run has 25 steps"):
        Restarts(schedule=inner, first_steps=(10, 25)).build(25)
    with pytest.raises(UserError, match="which rise from 1"):
        Restarts(schedule=inner, first_steps=(10, 10))
    with pytest.raises(UserError, match="warmup=3 is longer than the run of 2 steps"):
        Restarts(schedule=inner, first_steps=(10, 12)).build(40)
