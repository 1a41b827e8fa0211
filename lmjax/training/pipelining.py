"""Training by a pipeline: the loss of a whole model, cut into what each stage does.

No model and no objective knows of pipelines. A model hands its blocks to an executor. With one that
stops there, the loss is followed up to the blocks: the pipeline's entry. With one that answers with
a given output it is followed from the blocks on: the exit. What the other half computes is not
used, and the compiler drops it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lmjax.config import UserError, config
from lmjax.models.executor import Executor
from lmjax.models.layer_by_layer import layer_passes, run_layer_by_layer
from lmjax.objectives import Example, Sums
from lmjax.parallel import DATA, STAGE, axis_size
from lmjax.parallel.passes import Slot, SlotPasses
from lmjax.parallel.pipeline import Pieces, evaluated, pipelined
from lmjax.parallel.schedules import Name, PipelineSchedule, schedule
from lmjax.parallel.stage_boundary import keep_shards
from lmjax.training.gradients import Zero, divided, scattered, without_fsdp

# (params, example, key, executor) -> sums of the loss, with the blocks run by the executor
LossBy = Callable[[dict, Example, jax.Array | None, Executor], Sums]
BLOCKS = "blocks"


@config
class Pipeline:
    """The order in which the stages of `mesh.stage` work on a batch's `accumulation` parts."""

    schedule: Name = "1f1b"  # of forward and backward; see lmjax.parallel.schedules
    chunks: int = 2  # parts of the model on each stage, of interleaved alone

    def validate(self) -> None:
        """Raises UserError for no chunks."""
        if self.chunks < 1:
            raise UserError(f"pipeline.chunks={self.chunks}: must be 1 or more")

    def made(self, microbatches: int) -> PipelineSchedule:
        """The schedule on the mesh that is set.

        Raises:
          UserError: too few microbatches for it, or not a number that it can take.
        """
        try:
            return schedule(self.schedule, axis_size(STAGE), microbatches, self.chunks)
        except UserError as error:
            raise UserError(
                f"{error} (accumulation is the number of microbatches, mesh.stage that of stages)"
            ) from None


class _Reached(Exception):
    """The arguments of a model's executor."""

    def __init__(self, *arguments: Any):
        super().__init__()
        self.arguments = arguments


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A loss, cut into the pieces of a pipeline of equal parts.

    Attributes:
      loss: of the whole model.
      blocks: parameters of all layers, as shapes.
      layers: entries of the stack of blocks that a part has.
      zero: see `lmjax.training.gradients.accumulated`.
    """

    loss: LossBy
    blocks: dict
    layers: int
    zero: Zero

    def pieces(self) -> Pieces:
        """Entry, part and exit."""
        return Pieces(self.enter, self.part, self.leave, self.passes)

    def enter(self, shared: dict, example: Any) -> jax.Array:
        """Input of the first block."""
        return self.reach(shared, example)[1]

    def part(self, params: dict, shared: dict, example: Any, x: jax.Array, number: jax.Array):
        """Runs the blocks of a part."""
        blocks, _, *given = self.own(params, shared, example, number)
        return run_layer_by_layer(blocks, x, *given)[0]

    def passes(self, params: dict, shared: dict, example: Any, number: jax.Array) -> SlotPasses:
        """The passes of `part`; gradients of weights are those of (params, shared)."""
        found = layer_passes(*self.own(params, shared, example, number))

        def given(params: dict, shared: dict) -> tuple[Any, ...]:
            blocks, _, _, tables = self.own(params, shared, example, number)
            return blocks.params, blocks.auxiliary, tables.bias

        def pull(gradients: Any) -> tuple[dict, dict]:
            return jax.vjp(given, params, shared)[1](gradients)

        def weights(kept: Slot, more: Slot) -> tuple[dict, dict]:
            return pull(found.weights(kept, more))

        def both(kept: Slot, d_y: jax.Array) -> tuple[jax.Array, tuple[dict, dict]]:
            d_x, gradients = found.both(kept, d_y)
            return d_x, pull(gradients)

        return found._replace(weights=weights, both=both)

    def own(self, params: dict, shared: dict, example: Any, number: jax.Array) -> tuple[Any, ...]:
        """The blocks of a part, an array of the type of their activations, mask and tables."""
        blocks, x, mask, tables, _ = self.reach(shared, example)
        group = blocks.group

        def cut(a, count=self.layers * group):
            return jax.lax.dynamic_slice_in_dim(a, number * count, count)

        if self.zero < 3:
            params = jax.tree.map(without_fsdp, params)
        keys, dropout = jax.tree.map(cut, (blocks.keys, blocks.dropout))
        auxiliary = jax.tree.map(lambda a: cut(a, self.layers), blocks.auxiliary)
        blocks = dataclasses.replace(
            blocks,
            params=params,
            keys=keys,
            dropout=dropout,
            windows=blocks.windows[: self.layers * group],
            auxiliary=auxiliary,
        )
        return blocks, x, mask, tables

    def leave(self, shared: dict, example: Any, y: jax.Array) -> Sums:
        """The loss, from what the last block gives."""
        calls = []

        def answer(*arguments):
            calls.append(arguments)
            return y, None

        sums = self.follow(shared, example, answer)
        if len(calls) > 1:
            raise UserError(
                f"the objective runs the model {len(calls)} times for an example, and a pipeline"
                " runs it once: set mesh.stage=1"
            )
        return sums

    def reach(self, shared: dict, example: Any) -> tuple[Any, ...]:
        """Arguments of the executor of the model: blocks, x, mask, tables, cache."""

        def stop(*arguments):
            raise _Reached(*arguments)

        try:
            self.follow(shared, example, stop)
        except _Reached as reached:
            return reached.arguments
        raise TypeError("the objective ran no model")

    def follow(self, shared: dict, example: Any, executor: Executor) -> Sums:
        """The loss, with the blocks run by an executor."""
        example, key = example
        return self.loss({BLOCKS: self.blocks, **shared}, example, key, executor)


def cut(loss: LossBy, params: dict, parts: int, zero: Zero = 3) -> _Cut:
    """Cuts a loss into pieces with equal parts of the layers."""
    blocks = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params[BLOCKS])
    return _Cut(loss, blocks, jax.tree.leaves(blocks)[0].shape[0] // parts, zero)


def pipeline_gradients(
    loss: LossBy,
    params: dict,
    example: Example,
    key: jax.Array,
    made: PipelineSchedule,
    zero: Zero = 3,
) -> tuple[dict, Sums]:
    """Gradients of the summed loss, sharded as the parameters, and the sums of the whole batch.

    They are those of `lmjax.training.gradients.accumulated` with as many microbatches, but for the
    order of additions.

    Args:
      loss: of the whole model, by an executor of its blocks.
      params: those of the blocks divided over `stage` along their layers.
      example: the rows of the batch.
      key: randomness of the step.
      made: the schedule.
      zero: see `accumulated`; 2 gathers a stage's layers for each microbatch.
    """
    parts = len(made.holder)
    pieces = cut(loss, params, parts, zero).pieces()
    given = {**params, BLOCKS: by_stage(params[BLOCKS], made)}
    if zero == 1:
        given = jax.tree.map(without_fsdp, given)
    shared = {name: tree for name, tree in given.items() if name != BLOCKS}

    def body(blocks, shared, examples):
        chunks = jax.tree.map(lambda a: _split(a, made.chunks), blocks)
        axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        (d_chunks, d_shared), sums = pipelined(made, pieces, chunks, shared, examples, axes)
        return jax.tree.map(_merge, d_chunks), d_shared, sums

    keys = jax.random.split(key, made.microbatches)
    examples = divided(example, made.microbatches), keys
    run = _over_stages(body, (P(STAGE), P(), P()))
    d_blocks, d_shared, sums = run(given[BLOCKS], shared, examples)
    found = {BLOCKS: by_stage(d_blocks, made, back=True), **d_shared}
    return scattered(found, params), sums


def pipeline_sums(loss: LossBy, params: dict, example: Example, microbatches: int) -> Sums:
    """Sums of the loss without gradients and without dropout.

    Args:
      loss: of the whole model, by an executor of its blocks.
      params: those of the blocks divided over `stage` along their layers.
      example: the rows of the batch.
      microbatches: equal parts of the rows, one after another.
    """
    stages = axis_size(STAGE)
    pieces = cut(loss, params, stages).pieces()
    shared = {name: tree for name, tree in params.items() if name != BLOCKS}

    def body(blocks, shared, examples):
        axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        return evaluated(stages, pieces, blocks, shared, examples, axes)

    examples = divided(example, microbatches), None
    return _over_stages(body, P())(params[BLOCKS], shared, examples)


def _over_stages(body: Callable, out_specs: Any) -> Callable:
    """A function of (blocks, shared, (example, keys)), on each stage and each shard over `data`.

    Gradients are added up over `data` once, after the last tick: were it no manual axis, they would
    be at every tick.
    """
    keep_shards()
    manual = (STAGE, DATA) if axis_size(DATA) > 1 else (STAGE,)
    rows = P(None, DATA) if DATA in manual else P()
    in_specs = P(STAGE), P(), (rows, P())
    return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names=set(manual))


def by_stage(blocks: dict, made: PipelineSchedule, back: bool = False) -> dict:
    """Layers in the order in which the stages hold them, or from it back in their own.

    They are so already where a stage has one part. Otherwise each stage gets its parts' layers from
    where these are at rest: parameters, checkpoints and optimizer keep the model's order.
    """
    if made.chunks == 1:
        return blocks
    order = np.argsort(np.asarray(made.holder), kind="stable")  # part at each position
    order = np.argsort(order) if back else order

    def reordered(a):
        spec = jax.typeof(a).sharding.spec
        parts = len(made.holder)
        whole = a.reshape(parts, -1, *a.shape[1:], out_sharding=P(spec[0], None, *spec[1:]))
        out = P(spec[0], None, *spec[1:])
        moved = whole.at[order].get(out_sharding=out)
        return moved.reshape(a.shape, out_sharding=P(*spec))

    return jax.tree.map(reordered, blocks)


def _split(a: jax.Array, chunks: int) -> jax.Array:
    """A stage's layers as [chunks, layers of a part, ...]."""
    spec = tuple(jax.typeof(a).sharding.spec)
    return a.reshape(chunks, -1, *a.shape[1:], out_sharding=P(None, *spec))


def _merge(a: jax.Array) -> jax.Array:
    """See `_split`."""
    spec = tuple(jax.typeof(a).sharding.spec)
    return a.reshape(-1, *a.shape[2:], out_sharding=P(*spec[1:]))
