"""The data plan: rows by step, batch sizes that change, ranges that are skipped."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, from_json, to_json
from lmjax.data.plan import Plan, PlanRow, make_plan


def rows(plan, steps):
    return np.concatenate([plan.rows(step) for step in range(steps)]).tolist()


@settings(max_examples=25)
@given(
    first=st.integers(1, 20),
    ramp=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), max_size=4),
)
def test_rows_go_on_without_gap_whatever_the_batch_size(first, ramp):
    plan = make_plan(0, first, tuple(ramp))
    found = rows(plan, 40)
    assert found == list(range(len(found)))
    assert all(plan.batch_size(step) == len(plan.rows(step)) for step in range(40))


def test_batch_size_from_a_step_on():
    plan = make_plan(0, 4).with_batch_size(10, 8)
    assert [plan.batch_size(step) for step in (0, 9, 10, 11)] == [4, 4, 8, 8]
    assert [plan.row0(step) for step in (0, 9, 10, 11)] == [0, 36, 40, 48]
    assert plan.with_batch_size(10, 2).batch_size(10) == 2  # takes the place of the other
    assert plan.with_batch_size(5, 2).batch_size(20) == 2


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=4))
def test_skipping_leaves_out_exactly_what_those_steps_took(ranges):
    plan = make_plan(0, 3, ((7, 5),))
    for first, more in ranges:
        before = rows(plan, 40)
        gone = set(rows(plan, first + more + 1)) - set(rows(plan, first) if first else [])
        plan = plan.skipping(first, first + more)
        after = rows(plan, 40)
        expected = [row for row in before if row not in gone]
        assert after[: len(expected)] == expected
        assert after == sorted(set(after)) and not gone & set(after)


def test_survives_json():
    plan = make_plan(3, 4, ((10, 8),)).skipping(5, 6)
    assert from_json(to_json(plan)) == plan


def test_plans_that_make_no_sense():
    row = PlanRow(first_step=0, first_row=0, batch_size=1)
    with pytest.raises(UserError, match="rise from 0"):
        Plan(table=())
    with pytest.raises(UserError, match="rise from 0"):
        Plan(table=(row, row))
    with pytest.raises(UserError, match="at least 1 row"):
        PlanRow(first_step=0, first_row=0, batch_size=0)
    with pytest.raises(UserError, match="lie apart"):
        Plan(table=(row,), skipped=((3, 5), (4, 6)))
    with pytest.raises(UserError, match="the last comes first"):
        make_plan(0, 1).skipping(3, 2)
