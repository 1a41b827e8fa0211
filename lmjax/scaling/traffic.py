"""Communication of a training step between chips, by axis of the mesh.

Bytes are those that leave each chip: of an array that is gathered or scattered over n chips, the
part (n - 1) / n of its size, of one that is summed twice that (rings; Thakur et al. 2005). They
follow what `tests/lmjax/training/test_collectives.py` counts in compiled programs, with what the
TPU's compiler adds up first: a sum in forward and one in backward for attention and feed-forward
each, of parallel blocks one for both. Of an all-to-all every chip keeps its own part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lmjax.models.residual import Parallel
from lmjax.scaling.clusters import Cluster
from lmjax.scaling.division import Division
from lmjax.scaling.workload import FLOAT32, Workload

SUM_MATRICES = 2  # bytes of a number of a weight's gradient where it is summed: the compute dtype


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one kind of collective moves in a step.

    Attributes:
      axis: of the mesh.
      kind: of the collective.
      what: is moved.
      bytes: that each chip sends in a step.
      hidden: whether chips compute meanwhile, as far as they have work.
      seconds: that the links need.
    """

    axis: str
    kind: str
    what: str
    bytes: float
    hidden: bool
    seconds: float


def plan_traffic(workload: Workload, division: Division, cluster: Cluster) -> tuple[Traffic, ...]:
    """All communication of a step.

    Args:
      workload: the model and its batch.
      division: how they are divided over chips.
      cluster: the chips and their links.
    """
    rates = cluster.rates(division.sizes)
    found = []
    for axis, kind, what, size, hidden in (
        *_weights(workload, division),
        *_activations(workload, division),
    ):
        chips = getattr(division, axis)
        times = {"all-reduce": 2, "collective-permute": chips / (chips - 1)}.get(kind, 1)
        sent = size * times * (chips - 1) / chips
        found.append(Traffic(axis, kind, what, sent, hidden, sent / rates[axis]))
    return tuple(found)


Row = tuple[str, str, str, float, bool]  # axis, kind, what, bytes of the result, hidden


def _weights(workload: Workload, division: Division) -> Iterator[Row]:
    """Collectives of weights and gradients: over fsdp, and over data, context and expert."""
    c, n = workload.itemsize, division.microbatches
    used = workload.on_chip(division, gathered=True)
    layers = workload.on_chip(division, gathered=True, part="layers")
    trained, table = workload.trained, workload.vocabulary / division.tensor
    if division.fsdp > 1:
        kind = "all-reduce" if division.zero < 3 else "reduce-scatter"
        if division.zero == 3:
            passes = division.forwards + 1
            times = {2: "twice", 3: "three times"}[passes]
            what = f"weights of each layer, {times}"
            yield "fsdp", "all-gather", what, passes * n * c * layers, True
            yield "fsdp", "all-gather", "token table, and head once", (n + 1) * c * table, True
        else:
            yield "fsdp", "all-gather", "all weights", c * used, False
        yield "fsdp", kind, "gradients of layers", n * c * layers * trained, True
        ends = n * (FLOAT32 + c) * table * trained
        yield "fsdp", "reduce-scatter", "gradients of table and head", ends, True
    # What is summed over data and context is cut over fsdp already, but not with ZeRO 1 and 2.
    cut = workload.on_chip(division, gathered=division.zero < 3, part="layers")
    size = trained * (c * cut + (FLOAT32 + c) * table / division.fsdp)
    experts = workload.on_chip(division, gathered=division.zero < 3, part="experts")
    sums = {"data": size, "context": size, "expert": size - trained * c * experts}
    for axis, size in sums.items():
        if getattr(division, axis) > 1:
            once = division.sums_once or (axis == "data" and division.stage > 1)
            what = "gradients" if axis != "expert" else "gradients of all but experts"
            yield axis, "all-reduce", what, size * (1 if once else n), not once


def _activations(workload: Workload, division: Division) -> Iterator[Row]:
    """Collectives of activations: over tensor, context and stage."""
    model, c = workload.model, workload.itemsize
    n, tokens = division.microbatches, division.rows * workload.length / division.context
    hidden = c * tokens * model.hidden
    in_layers = c * workload.token_layers(division)  # bytes of a number of each token and layer
    parallel = isinstance(model.arrangement, Parallel)
    if division.tensor > 1:
        each, again = 1 if parallel else 2, division.remat != "none"
        passes = each * (division.forwards + 1)
        # The sum in the middle of a block, on which what is made again depends.
        sums = passes + (division.remat == "full" and not parallel)
        size = n * in_layers * model.hidden
        if division.sequence_parallel:
            gathers = passes + each * again
            yield "tensor", "all-gather", "activations of each layer", gathers * size, False
            yield "tensor", "reduce-scatter", "sums of each layer", sums * size, False
        else:
            yield "tensor", "all-reduce", "activations of each layer", sums * size, False
        yield "tensor", "all-reduce", "embeddings and the head's gradient", 2 * n * hidden, False
    if division.context > 1:
        attention = model.attention
        shards = 1 if attention.kv_heads % division.tensor else division.tensor
        keys = 2 * attention.kv_heads * attention.head_dim / shards
        whole = in_layers * division.context * keys * n
        times = division.forwards + (0 if division.remat == "none" else 1)
        yield "context", "all-gather", "keys and values of each layer", times * whole, False
        yield "context", "reduce-scatter", "gradients of keys and values", whole, False
    if division.expert > 1 and workload.experts is not None:
        yield from _routed(workload, division)
    if division.stage > 1:
        messages = 2 * (division.ticks if division.parts_again else n * division.parts)
        sent = messages * hidden / division.streams
        yield "stage", "collective-permute", "activations and their gradients", sent, True


def _routed(workload: Workload, division: Division) -> Iterator[Row]:
    """Collectives of tokens on their way to experts and back; see `lmjax.models.expert_exchange`.

    What a policy does not keep moves once more: to the experts, and within a capacity back as well.
    """
    c, n, router = workload.itemsize, division.microbatches, workload.experts.router
    layers = workload.token_layers(division) / workload.model.group  # tokens of sparse layers
    width = n * c * layers * workload.model.hidden
    again = 0 if division.remat == "none" else 1
    passes = division.forwards + 1
    if router.drops:
        slots = router.room(workload.experts.experts)
        moved = 2 * (passes + again) * width * slots
        yield "expert", "all-to-all", "tokens to experts and back", moved, False
    else:
        whole = width * division.expert
        yield "expert", "all-gather", "tokens to experts", (passes + again) * whole, False
        yield "expert", "reduce-scatter", "sums of experts", passes * whole, False
