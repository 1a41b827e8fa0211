"""Bubbles and microbatches held against the simulated schedules; meshes against topologies."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.parallel.schedules import Name, schedule
from lmjax.scaling.division import Division, microbatches_of, resolve_sizes

MESH = dict(data=1, fsdp=16, stage=1, context=1, tensor=8)
NAMES = Name.__args__


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.integers(2, 6), st.integers(1, 4), st.integers(2, 3))
def test_bubble_and_memory_are_those_of_the_schedule(name, stages, groups, chunks):
    microbatches = stages * groups
    made = schedule(name, stages, microbatches, chunks)
    own = made.chunks if name == "interleaved" else 1
    division = Division(stage=stages, microbatches=microbatches, schedule=name, chunks=own)
    assert division.bubble == pytest.approx(made.bubble(1.0, 1.0, 1.0), abs=1e-9)
    most = max(made.live) / made.chunks
    # Of zero-bubble schedules the formula is a bound, which short ones do not reach.
    assert division.live == most if not made.split else division.live >= most


@given(st.floats(0.5, 3), st.sampled_from(["gpipe", "1f1b", "interleaved"]), st.integers(1, 3))
def test_bubble_does_not_depend_on_the_times_where_all_work_is_paired(backward, name, groups):
    made = schedule(name, 4, 4 * groups, 2)
    chunks = 2 if name == "interleaved" else 1
    division = Division(stage=4, microbatches=4 * groups, schedule=name, chunks=chunks)
    assert division.bubble == pytest.approx(made.bubble(1.0, backward, 1.0), abs=1e-9)


@settings(max_examples=40)
@given(st.sampled_from(NAMES), st.integers(2, 6), st.integers(1, 4), st.integers(2, 3))
def test_ticks_are_those_of_the_schedule(name, stages, groups, chunks):
    """Of zero-bubble schedules they are the least number, which few microbatches do not reach."""
    made = schedule(name, stages, stages * groups, chunks)
    own = made.chunks if name == "interleaved" else 1
    division = Division(stage=stages, microbatches=stages * groups, schedule=name, chunks=own)
    assert division.parts == made.chunks
    assert len(made.ticks) >= division.ticks
    if not made.split:
        assert len(made.ticks) == division.ticks


def test_no_pipeline_waits_for_nothing():
    assert Division(microbatches=7).bubble == 0
    assert Division(microbatches=7).live == 1


def test_a_mesh_is_repeated_over_a_larger_topology():
    assert resolve_sizes(MESH, 128) == (MESH, False)
    assert resolve_sizes(MESH, 1024) == (MESH | {"data": 8}, True)
    assert resolve_sizes(MESH | {"fsdp": -1}, 1024) == (MESH | {"fsdp": 128}, False)


@pytest.mark.parametrize(
    ("changes", "chips", "words"),
    [
        ({}, 64, "needs 128 chips, and the topology has 64"),
        ({}, 192, "128 chips do not divide the topology's 192"),
        ({"data": -1, "fsdp": -1}, 64, "only one axis"),
    ],
)
def test_meshes_that_do_not_fit_a_topology(changes, chips, words):
    with pytest.raises(UserError, match=words):
        resolve_sizes(MESH | changes, chips)


@given(st.integers(1, 64), st.integers(1, 24), st.integers(1, 40))
def test_rows_are_divided_evenly(shards, own, wanted):
    rows, microbatches = microbatches_of(shards * own, shards, wanted)
    assert rows * microbatches == own
    assert rows <= wanted


def test_rows_that_do_not_divide():
    with pytest.raises(UserError, match=r"a batch of 10 rows does not divide among .* = 4 shards"):
        microbatches_of(10, 4, 1)
