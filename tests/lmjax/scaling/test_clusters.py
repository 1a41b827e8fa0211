"""Names of clusters, and the rates of their links against rings worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.scaling.clusters import ACCELERATORS, find_cluster
from lmjax.scaling.division import AXES
from pallas_kernels.chips import CHIPS as TPU_CHIPS


def rates(name, slices=1, **sizes):
    """Of axes that have more than one chip, in GB/s."""
    whole = dict.fromkeys(AXES, 1) | sizes
    found = find_cluster(name, slices).rates(whole)
    return {axis: found[axis] / 1e9 for axis in sizes}


def test_a_shape_or_a_number():
    assert find_cluster("v4:8x8x16").chips == 1024
    assert find_cluster("v4:64").shape == (4, 4, 4)
    assert find_cluster("v5e:256").shape == (16, 16)
    assert find_cluster("a100-40gb:1024").shape == (1024,)
    assert find_cluster("A100:8").accelerator.name == "a100-80gb"
    assert find_cluster("v4:12x16x16", 2).chips == 6144
    assert find_cluster("h100").chips == 1


@pytest.mark.parametrize(
    ("name", "slices", "words"),
    [
        ("v44:8", 1, "known are v3, v4, v5e, v5p, v6e, tpu7x, v100, a100-40gb.*mean v4"),
        ("h800:8", 1, "known are"),
        ("v4:8x8y8", 1, "'8x8y8' is no number of chips"),
        ("v4:0", 1, "'0' is no number"),
        ("v5e:4x4x4", 1, "shapes of 2 dimensions"),
        ("h100:8x8", 1, "h100:64"),
        ("h100:64", 2, "slices=2"),
        ("v4:64", 0, "slices=0"),
    ],
)
def test_unknown_topologies_are_refused(name, slices, words):
    with pytest.raises(UserError, match=words):
        find_cluster(name, slices)


def test_peaks_are_those_of_the_table_of_tpus():
    for name, chip in TPU_CHIPS.items():
        assert ACCELERATORS[name].chip.flops == pytest.approx(chip.peak, rel=0.01)
        assert ACCELERATORS[name].bandwidth == chip.bandwidth


def test_a_v4_has_the_memory_that_the_compiler_leaves():
    assert ACCELERATORS["v4"].memory == 30.75 * 2**30


def test_axes_over_whole_dimensions_use_their_links_in_both_directions():
    assert rates("v4:8x8x16", tensor=8, fsdp=128) == {"tensor": 90, "fsdp": 180}
    assert rates("v4:8x8x16", fsdp=1024) == {"fsdp": 270}
    assert rates("v5p:4x4x4", tensor=4, fsdp=16) == {"tensor": 180, "fsdp": 360}


def test_parts_of_a_dimension_are_lines():
    assert rates("v4:8x8x16", tensor=4, data=256) == {"tensor": 45, "data": 225}
    assert rates("v4:2x2x2", fsdp=8) == {"fsdp": 135}  # no ring below 4
    assert rates("v5e:4x4", fsdp=16) == {"fsdp": 90}
    assert rates("v5e:16x16", tensor=16, fsdp=16) == {"tensor": 90, "fsdp": 90}


def test_slices_are_joined_by_the_network():
    found = rates("v4:12x16x16", 2, data=2, fsdp=256, tensor=12)
    assert found == {"data": 6.25, "fsdp": 180, "tensor": 90}


def test_gpus_of_a_node_share_its_network():
    assert rates("a100:64", tensor=8, fsdp=8) == {"tensor": 240, "fsdp": 22.5}
    assert rates("a100:64", tensor=2, fsdp=32) == {"tensor": 240, "fsdp": 90}
    assert rates("a100:64", fsdp=64) == {"fsdp": 180}
    assert rates("a100:8", fsdp=8) == {"fsdp": 240}
    assert rates("h100:64", tensor=16, data=4) == {"tensor": 360, "data": 45}


@given(
    st.sampled_from(sorted(ACCELERATORS)),
    st.lists(st.integers(0, 3), min_size=len(AXES), max_size=len(AXES)),
)
def test_every_axis_has_a_rate(name, powers):
    sizes = {axis: 2**power for axis, power in zip(AXES, powers, strict=True)}
    found = find_cluster(f"{name}:{math.prod(sizes.values())}").rates(sizes)
    assert found.keys() == set(AXES)
    assert all(rate > 0 for rate in found.values())
