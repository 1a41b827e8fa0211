"""Meshes over several TPU slices: one axis goes from slice to slice, all others stay inside."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies as described
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax.config import UserError
from lmjax.parallel import Mesh
from lmjax.parallel.mesh import AXES, count_slices, over_slices
from pallas_kernels import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is laid by."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    @property
    def process_index(self) -> int:
        return self.id // 4


def chips(slices: int, x: int = 2, y: int = 2) -> list[Chip]:
    """So many slices of x times y chips, mixed up."""
    inside = [(i, j, 0) for j in range(y) for i in range(x)]
    made = [
        Chip(number * len(inside) + k, number, place)
        for number in range(slices)
        for k, place in enumerate(inside)
    ]
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


def laid(mesh: Mesh, devices) -> np.ndarray:
    return over_slices(devices, mesh.sizes(len(devices)), count_slices(devices))


@pytest.mark.parametrize(
    ("mesh", "outer"),
    [
        (Mesh(data=2), "data"),
        (Mesh(data=4, tensor=2, fsdp=1), "data"),
        (Mesh(data=2, fsdp=2, tensor=2), "data"),
        (Mesh(stage=2, fsdp=2, tensor=2), "stage"),
    ],
)
def test_one_axis_alone_goes_from_slice_to_slice(mesh, outer):
    """Each line along another axis lies in one slice; blocks along the outer one do too."""
    devices = laid(mesh, chips(2))
    slices = np.vectorize(lambda chip: chip.slice_index)(devices)
    for axis, name in enumerate(AXES):
        lines = np.moveaxis(slices, axis, -1).reshape(-1, slices.shape[axis])
        if name == outer:
            half = slices.shape[axis] // 2
            assert (lines == [0] * half + [1] * half).all()
        else:
            assert (lines == lines[:, :1]).all()
    assert len({chip.id for chip in devices.ravel()}) == 8


def test_slices_that_no_axis_can_join_are_refused():
    with pytest.raises(UserError, match=r"mesh.data=1, mesh.stage=1: the 8 devices are 2 slices"):
        laid(Mesh(fsdp=8), chips(2))
    with pytest.raises(UserError, match=r"must be a multiple of 3: set mesh.data=3"):
        laid(Mesh(data=2, fsdp=-1), chips(3))


def test_hosts_of_other_devices_are_no_slices():
    """GPUs have their hosts there, and a mesh may be laid over them as it likes."""
    gpus = [dataclasses.replace(chip, platform="gpu") for chip in chips(2)]
    assert count_slices(gpus) == 1


def test_gathers_over_fsdp_stay_in_a_slice():
    """In a program that XLA compiles for two slices that are not there.

    It is one for a slice of four devices; what goes to the other slice is sent and received.
    """
    if not topologies.has_tpu_compiler():
        pytest.skip("needs libtpu")
    topologies.tpu("v4")  # sets what libtpu reads
    devices = described.get_topology_desc(
        platform="tpu", topology_name="v4:2x2x1", chip_config_name="megacore", num_slices=2
    ).devices
    mesh = Mesh(data=2, fsdp=-1).build(devices)
    assert [{d.slice_index for d in row.ravel()} for row in mesh.devices] == [{0}, {1}]

    def loss(w, x):
        return jnp.sum(jnp.square(x @ jax.reshard(w, P(None, None))))

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        weight, rows = abstract((512, 512), "fsdp"), abstract((1024, 512), ("data", "fsdp"))
        text = jax.jit(jax.grad(loss)).lower(weight, rows).compile().as_text()
    gathers = re.findall(r" all-gather(?:-start)?\(.*?replica_groups=(\S+),", text)
    assert gathers and set(gathers) == {"{{0,1,2,3}}"}
    assert " send(" in text and "_xla_host_transfer" in text
