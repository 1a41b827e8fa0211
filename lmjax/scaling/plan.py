"""Time of a training step by roofline, with the bottleneck named.

A chip's time for the blocks is the longer of the FLOPs over the reachable part of its peak (one
number for each kind of chip, `Accelerator.efficiency`) and of the bytes over its memory's
bandwidth. Weights that are gathered and gradients that are summed move meanwhile; what takes longer
than the blocks is waited for. Sums over `tensor` (on TPUs one half of them), keys gathered over
`context` and tokens that go over `expert` are waited for, as what follows depends on them. All that
is done once for each microbatch waits in a pipeline as the schedule says. Layers are taken as
spread evenly over stages, the head's work as well, and tokens evenly over experts.
"""

from __future__ import annotations

import dataclasses
import functools

from lmjax.config import UserError
from lmjax.scaling.clusters import Cluster
from lmjax.scaling.division import Division
from lmjax.scaling.memory import MemoryPlan, plan_memory
from lmjax.scaling.traffic import Traffic, plan_traffic
from lmjax.scaling.workload import FLOAT32, Workload

SECONDS_A_DAY = 86_400
WAITED = "tensor", "context", "expert"  # axes over which activations move
BOTTLENECKS = {
    "products": "matrix units",
    "memory": "memory bandwidth",
    "tensor": "sums over tensor",
    "context": "keys and values over context",
    "expert": "tokens over expert",
    "gathers": "weights and gradients over fsdp and data",
    "bubble": "bubble of the pipeline",
    "optimizer": "optimizer's memory traffic",
}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A training step on a cluster.

    Attributes:
      workload: the model and its batch.
      division: how they are divided.
      cluster: the chips.
    """

    workload: Workload
    division: Division
    cluster: Cluster

    @functools.cached_property
    def memory(self) -> MemoryPlan:
        """Bytes on the fullest chip."""
        return plan_memory(self.workload, self.division)

    @functools.cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """Communication of a step."""
        return plan_traffic(self.workload, self.division, self.cluster)

    @property
    def missing(self) -> float:
        """Bytes that a chip has too few; 0 or less: it fits."""
        return self.memory.total - self.cluster.accelerator.memory

    @property
    def fits(self) -> bool:
        """Returns whether the step fits into the chips' memory."""
        return self.missing <= 0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.division.batch * self.workload.length

    @functools.cached_property
    def times(self) -> dict[str, float]:
        """Seconds of a step, by what they are spent on; the keys are those of `BOTTLENECKS`.

        Of products and memory traffic, which overlap, the shorter one is 0.
        """
        products, bytes_ = self._products(), self._bytes()
        network = self.cluster.accelerator.network
        exposed = dict.fromkeys(WAITED, 0.0)
        covered = 0.0
        for moved in self.traffic:
            if moved.hidden:
                covered += moved.seconds
            else:
                axis = moved.axis if moved.axis in WAITED else "gathers"
                share = network.exposed if axis == "tensor" else 1.0
                exposed[axis] = exposed.get(axis, 0.0) + share * moved.seconds
        blocks = max(products, bytes_)
        late = max(0.0, covered - blocks)
        waiting = (blocks + sum(exposed[axis] for axis in WAITED)) * (self.division.delay - 1)
        return {
            "products": products if products >= bytes_ else 0.0,
            "memory": bytes_ if bytes_ > products else 0.0,
            **{axis: exposed[axis] for axis in WAITED},
            "gathers": late + exposed.get("gathers", 0.0),
            "bubble": waiting,
            "optimizer": self._optimizer(),
        }

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.times.values())

    @property
    def bottleneck(self) -> str:
        """Words for what most of the step is spent on."""
        return BOTTLENECKS[max(self.times, key=self.times.get)]

    @property
    def lost(self) -> str:
        """Words for what most of the step is spent on, products left out."""
        rest = {name: seconds for name, seconds in self.times.items() if name != "products"}
        return BOTTLENECKS[max(rest, key=rest.get)]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all chips."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak."""
        return self.tokens_per_second * self.workload.model_flops / self.cluster.peak

    @property
    def hfu(self) -> float:
        """FLOPs with what is computed again, over the peak."""
        flops = self.workload.hardware_flops(self.division)
        return self.tokens_per_second * flops / self.cluster.peak

    @property
    def days(self) -> float:
        """Days of training without a stop."""
        return self.workload.tokens / self.tokens_per_second / SECONDS_A_DAY

    def _products(self) -> float:
        flops = self.tokens * self.workload.hardware_flops(self.division)
        return flops / (self.cluster.peak * self.cluster.accelerator.efficiency)

    def _bytes(self) -> float:
        """Seconds that memory needs for weights and activations of all microbatches."""
        division, workload = self.division, self.workload
        passes = 4 if division.remat == "full" else 3
        weights = passes * workload.itemsize * workload.on_chip(division, gathered=True)
        kept = workload.token_layers(division) * workload.kept_bytes("none", division)
        moved = division.microbatches * (weights + (passes - 1) * kept)
        return moved / self.cluster.accelerator.bandwidth

    def _optimizer(self) -> float:
        """Seconds in which parameters, gradients and state are read, and written but the second."""
        workload, trained = self.workload, self.workload.trained
        state = workload.optimizer_share * trained
        average = 2 if workload.average else 0
        moved = (workload.stored_bytes + FLOAT32) * (1 + trained) + FLOAT32 * (2 * state + average)
        moved *= workload.on_chip(self.division)
        return moved / self.cluster.accelerator.bandwidth


def check_division(workload: Workload, division: Division, cluster: Cluster) -> None:
    """Checks that a step can be divided so.

    Raises:
      UserError: an axis does not divide what it cuts, or the pipeline has too few microbatches.
    """
    model = workload.model
    cuts = [
        ("tensor", "model.attention.num_heads", model.attention.num_heads),
        ("tensor", "model.feed_forward.size", model.feed_forward.size),
        ("tensor", "rows of the vocabulary", model.padded_vocab),
        ("fsdp", "model.hidden", model.hidden),
        ("context", "tokens of a row", workload.length),
        ("streams", "tokens of a part of a row", workload.length // division.context),
        ("stage", "model.num_layers", model.num_layers),
    ]
    if (other := model.alternate_feed_forward) is not None:
        cuts.append(("tensor", "model.alternate_feed_forward.size", other.size))
        cuts.append(("stage", "pairs of layers", model.num_layers // model.group))
    if workload.experts is not None:
        number = workload.experts.experts
        cuts.append(("expert", "model.feed_forward.experts", number))
    for axis, what, size in cuts:
        if size % (shards := getattr(division, axis)):
            name = "tensor" if axis == "streams" else axis
            raise UserError(
                f"mesh.{name}={shards} does not divide {what}={size:,}; near ones that do are"
                f" {' and '.join(map(str, near_divisors(size, shards)))}"
            )
    if division.chips != cluster.chips:
        raise UserError(f"{division}: {division.chips:,} chips of {cluster.chips:,}")
    if cluster.slices > 1 and division.data % cluster.slices:
        raise UserError(
            f"mesh.data={division.data} is no multiple of slices={cluster.slices}: only the axis"
            " data goes over the network between slices"
        )
    check_schedule(division)


def check_schedule(division: Division) -> None:
    """Raises UserError for a pipeline that has too few microbatches, or a wrong number of them."""
    stages, microbatches = division.stage, division.microbatches
    if stages > 1 and microbatches < stages:
        raise UserError(
            f"mesh.stage={stages}: {microbatches} microbatches are too few for {stages} stages;"
            " a larger accumulation, or smaller mesh.data x mesh.fsdp, makes more of them"
        )
    if stages > 1 and division.schedule in ("interleaved", "zb_v") and microbatches % stages:
        raise UserError(
            f"pipeline.schedule={division.schedule}: {microbatches} microbatches are no multiple of"
            f" {stages} stages"
        )


def near_divisors(number: int, near: int) -> tuple[int, ...]:
    """The divisors of a number next to another one, below and above."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    below = [size for size in divisors if size <= near]
    above = [size for size in divisors if size >= near]
    return tuple(dict.fromkeys((*below[-1:], *above[:1])))
