"""Meshes and layouts: sizes, the rule for what does not divide, and clear refusals."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.config import UserError
from lmjax.parallel import Mesh, generation_layout, training_layout
from pallas_kernels import topologies


def test_minus_one_takes_the_rest():
    assert Mesh(data=2, fsdp=-1, tensor=2).sizes(8) == (2, 2, 1, 1, 1, 2)
    assert dict(Mesh(fsdp=2, context=2, tensor=2).build().shape) == {
        "data": 1,
        "fsdp": 2,
        "expert": 1,
        "stage": 1,
        "context": 2,
        "tensor": 2,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(fsdp=0), "mesh.fsdp=0"),
        (dict(data=-1, fsdp=-1), "only one axis may be -1"),
        (dict(fsdp=-1, tensor=3), "multiply to 3, which does not divide the 8 devices"),
        (dict(fsdp=4), "needs 4 devices, and there are 8.*JAX_NUM_CPU_DEVICES=4"),
    ],
)
def test_impossible_meshes_say_why(sizes, message):
    with pytest.raises(UserError, match=message):
        Mesh(**sizes).build()


@pytest.mark.skipif(not topologies.has_tpu_compiler(), reason="needs libtpu: lmjax[tpu]")
def test_an_axis_may_have_a_part_of_a_dimension_of_a_torus():
    """Of 4 x 4 x 4 chips: neighbours along the axis are neighbours in the torus."""
    devices = list(topologies.tpu("v4", (4, 4, 4)))
    pairs = Mesh(fsdp=32, tensor=2).build(devices).devices.reshape(32, 2)
    assert len({device.id for device in pairs.flat}) == 64
    for one, other in pairs:
        assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_axes_of_size_one_leave_no_trace_in_types():
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        assert training_layout().spec("batch", "seq", "embed") == P(None, None, None)


def test_what_does_not_divide():
    """Heads are refused, key-value heads replicated, generation's batch replicated."""
    with jax.set_mesh(Mesh(fsdp=2, tensor=4).build()):
        layout = training_layout()
        assert layout.spec("heads", "kv_heads", shape=(8, 2)) == P("tensor", None)
        with pytest.raises(UserError, match=r"heads of size 6 does not divide.*tensor=4"):
            layout.spec("heads", shape=(6,))
        with pytest.raises(UserError, match="batch of size 3"):
            layout.spec("batch", shape=(3,))
        assert generation_layout().spec("batch", shape=(3,)) == P(None)
