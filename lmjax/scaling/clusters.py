"""Clusters by name: kinds of accelerators, how many there are, and the links between them.

`v4:8x8x16` is a slice of TPUs by its shape, `a100-40gb:1024` a number of GPUs. Peak rates and sizes
of memory are those of `lmjax.scaling.hardware`, bandwidths of TPU memory those of
`pallas_kernels.chips`; the others, and the rates of links, are the makers' (NVIDIA's data sheets;
cloud.google.com/tpu/docs, of whose link rates 0.9 are taken, as the measured 45 GB/s of a v4 link
of 50 are). Of NVLink and InfiniBand 0.8 and 0.9 are taken, as NCCL's collectives reach.

Dollars are on-demand list prices of an hour, rounded, of 2024 and 2025 (1.50 for a V100 is the
price that GPT-3's 4.6 million dollars were estimated with). Watts are what a chip may draw: data
sheets of GPUs, means of Jouppi et al. 2023 (arXiv:2304.01433) for v3 and v4, estimates for later
TPUs.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence

from lmjax.config import UserError
from lmjax.parallel.mesh import AXES
from lmjax.scaling.hardware import CHIPS, Chip
from pallas_kernels.chips import CHIPS as TPU_CHIPS

INNER_TO_OUTER = tuple(reversed(AXES))  # neighbours first


@dataclasses.dataclass(frozen=True)
class Torus:
    """Links of TPUs, to the neighbours along each dimension of a slice.

    Attributes:
      dimensions: of the largest slice.
      link: bytes a second that a chip sends over one link.
      ring: chips along a dimension close to a ring where this divides their number.
      outside: bytes a second and chip between slices, over the data centre's network.
      exposed: part of the time of sums over `tensor` that is waited for. XLA cuts them into pieces
        that move while the products beside them are computed (Wang et al. 2023, ASPLOS,
        doi:10.1145/3567955.3567959): one half is taken, for all TPUs.
    """

    dimensions: int
    link: float
    ring: int
    outside: float = 6.25e9
    exposed: float = 0.5

    def shape(self, count: int) -> tuple[int, ...]:
        """The most cubic shape of so many chips."""
        shapes = [
            sizes
            for sizes in _factorings(count, self.dimensions)
            if all(size & (size - 1) == 0 or size % 4 == 0 for size in sizes)
        ]
        return min(shapes or [(count,)], key=lambda sizes: (max(sizes), sizes))

    def rates(self, shape: Sequence[int], sizes: Mapping[str, int]) -> dict[str, float]:
        """Bytes a second and chip that a collective over each axis moves; see `Cluster.rates`."""
        free, found = list(shape), {}
        untouched = [True] * len(free)
        for axis in INNER_TO_OUTER:
            rate, left = 0.0, sizes[axis]
            for index in _whole(free, untouched, left) or _order(free):
                taken = math.gcd(left, free[index])
                if taken > 1:
                    closed = untouched[index] and taken == free[index] and not taken % self.ring
                    rate += self.link * (2 if closed else 1)
                    free[index], left, untouched[index] = free[index] // taken, left // taken, False
            found[axis] = rate or self.link
        return found


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Links of GPUs: all of a node to each other, and a network between nodes.

    Attributes:
      size: GPUs of a node.
      inside: bytes a second that a GPU sends to others of its node.
      outside: bytes a second that a GPU sends to other nodes.
      exposed: part of the time of sums over `tensor` that is waited for: all of it.
    """

    size: int
    inside: float
    outside: float
    exposed: float = 1.0

    def shape(self, count: int) -> tuple[int, ...]:
        """GPUs have no shape but their number."""
        return (count,)

    def rates(self, shape: Sequence[int], sizes: Mapping[str, int]) -> dict[str, float]:
        """Bytes a second and GPU that a collective over each axis moves; see `Cluster.rates`.

        Devices of an axis that share a node share the node's network as well.
        """
        del shape
        found, stride = {}, 1
        for axis in INNER_TO_OUTER:
            size = sizes[axis]
            together = min(size, max(1, self.size // stride))
            crosses = together < size
            found[axis] = min(self.inside, self.outside * together) if crosses else self.inside
            stride *= size
        return found


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of chip, with what belongs to each of them.

    Attributes:
      name: on the command line.
      chip: its peak and its memory.
      bandwidth: bytes a second of its memory.
      network: its links.
      efficiency: part of the peak that a step's products reach, with the other operations between
        them, where nothing waits for links; one number a kind, from `lmjax.scaling.calibration`.
      usable: part of the memory that a program may have.
      watts: of a chip.
      dollars: of an hour of a chip.
    """

    name: str
    chip: Chip
    bandwidth: float
    network: Torus | Nodes
    efficiency: float
    usable: float
    watts: float
    dollars: float

    @property
    def memory(self) -> float:
        """Bytes that a program may have."""
        return self.chip.memory * self.usable


def _tpu(
    kind: str,
    name: str,
    network: Torus,
    efficiency: float,
    watts: float,
    dollars: float,
    bandwidth: float | None = None,
) -> Accelerator:
    """A TPU; the compiler leaves 30.75 of a v4's 32 GiB to a program."""
    rate = TPU_CHIPS[kind].bandwidth if bandwidth is None else bandwidth
    usable = 30.75 / 32
    return Accelerator(kind, CHIPS[name], rate, network, efficiency, usable, watts, dollars)


def _gpu(
    kind: str,
    name: str,
    bandwidth: float,
    network: Nodes,
    efficiency: float,
    watts: float,
    dollars: float,
) -> Accelerator:
    """A GPU; about 6 percent of the memory are CUDA's, NCCL's and lost between buffers."""
    return Accelerator(kind, CHIPS[name], bandwidth, network, efficiency, 0.94, watts, dollars)


_A100, _H100 = Nodes(8, 240e9, 22.5e9), Nodes(8, 360e9, 45e9)
ACCELERATORS = {
    found.name: found
    for found in (
        _tpu("v3", "TPU v3", Torus(2, 74e9, 32), 0.70, 220.0, 2.20, bandwidth=900e9),
        _tpu("v4", "TPU v4", Torus(3, 45e9, 4), 0.69, 170.0, 3.22),
        _tpu("v5e", "TPU v5e", Torus(2, 45e9, 16), 0.83, 200.0, 1.20),
        _tpu("v5p", "TPU v5p", Torus(3, 90e9, 4), 0.82, 450.0, 4.20),
        _tpu("v6e", "TPU v6e", Torus(2, 90e9, 16), 0.63, 300.0, 2.70),
        _tpu("tpu7x", "TPU7x", Torus(3, 90e9, 4), 0.63, 1000.0, 12.00, bandwidth=7370e9),
        _gpu("v100", "V100-SXM2-32GB", 900e9, Nodes(8, 120e9, 11e9), 0.50, 300.0, 1.50),
        _gpu("a100-40gb", "A100-SXM4-40GB", 1555e9, _A100, 0.55, 400.0, 2.00),
        _gpu("a100-80gb", "A100-SXM4-80GB", 2039e9, _A100, 0.55, 400.0, 2.50),
        _gpu("h100", "H100 80GB HBM3", 3350e9, _H100, 0.525, 700.0, 3.50),
        _gpu("h200", "H200", 4800e9, _H100, 0.79, 700.0, 4.00),
    )
}
SHORT = {"a100": "a100-80gb"}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Chips of one kind with links between them.

    Attributes:
      accelerator: the kind.
      shape: chips along each dimension of a slice; of GPUs, their number.
      slices: equal parts that only the data centre's network joins; of GPUs 1.
    """

    accelerator: Accelerator
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """The name on the command line: `v4:8x8x16`."""
        times = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.accelerator.name}:{'x'.join(map(str, self.shape))}{times}"

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOPs a second of all chips."""
        return self.chips * self.accelerator.chip.flops

    def rates(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Bytes a second that each chip sends and receives in a collective over an axis.

        Axes are laid over the links from `tensor`, whose devices are neighbours, to `data`. An axis
        over whole dimensions of a torus uses all their links in both directions; one over a part of
        a dimension, or of a dimension that does not close to a ring, in one. With slices, `data`
        goes over the data centre's network.

        Args:
          sizes: of the mesh's axes.
        """
        network = self.accelerator.network
        if self.slices == 1:
            return network.rates(self.shape, sizes)
        inner = dict(sizes) | {"data": max(1, sizes["data"] // self.slices)}
        found = network.rates(self.shape, inner)
        outside = network.outside * inner["data"]
        return found | {"data": min(outside, found["data"])}


def find_cluster(name: str, slices: int = 1) -> Cluster:
    """The cluster of a name such as `v4:8x8x16` or `a100-40gb:1024`; without a number, one chip.

    Raises:
      UserError: there is no such kind of chip, no such shape, or no slices of it.
    """
    kind, colon, size = name.lower().partition(":")
    kind = SHORT.get(kind, kind)
    if kind not in ACCELERATORS:
        near = difflib.get_close_matches(kind, ACCELERATORS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"topology={name}: unknown; known are {', '.join(ACCELERATORS)}, each with a number of"
            f" chips (a100-40gb:1024) or a TPU's shape (v4:8x8x16){hint}"
        )
    accelerator = ACCELERATORS[kind]
    words = size.split("x") if colon else ["1"]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"topology={name}: {size!r} is no number of chips, and no shape as 8x8x16")
    shape, network = tuple(map(int, words)), accelerator.network
    most = network.dimensions if isinstance(network, Torus) else 1
    if len(shape) > most:
        raise UserError(
            f"topology={name}: {kind} has shapes of {most} dimensions"
            if most > 1
            else f"topology={name}: GPUs are given by their number, {kind}:{math.prod(shape)}"
        )
    if len(shape) == 1:
        shape = network.shape(shape[0])
    if slices < 1 or (slices > 1 and not isinstance(network, Torus)):
        raise UserError(f"slices={slices}: 1 or more, and 1 for GPUs: all are on one network")
    return Cluster(accelerator, shape, slices)


def _factorings(count: int, parts: int) -> list[tuple[int, ...]]:
    """Ways to write a number as a product of rising factors."""
    if parts == 1:
        return [(count,)]
    return [
        (*rest, size)
        for size in range(1, count + 1)
        if count % size == 0
        for rest in _factorings(count // size, parts - 1)
        if rest[-1] <= size
    ]


def _order(free: Sequence[int]) -> list[int]:
    """Dimensions, those with the fewest chips left first."""
    return sorted(range(len(free)), key=lambda index: free[index])


def _whole(free: Sequence[int], untouched: Sequence[bool], size: int) -> tuple[int, ...]:
    """Dimensions that an axis of a size fills, as many as can be; none where there are no such."""
    usable = [i for i in range(len(free)) if untouched[i] and free[i] > 1]
    for number in range(len(usable), 0, -1):
        for chosen in itertools.combinations(usable, number):
            if math.prod(free[i] for i in chosen) == size:
                return chosen
    return ()
