"""Pipeline parallelism: one program in which every stage follows its column of a schedule.

The schedule (`lmjax.parallel.schedules`) becomes tables of integers, one row a tick. A scan walks
over the ticks; in each, a stage looks up its row, does its work, or none, in branches that it takes
alone, and hands its results to its neighbours by two permutations outside of the branches. So
forward and backward of different microbatches run in one loop, and what a stage holds is bounded by
the schedule and not by the number of microbatches, as it would be if a loop of forward passes were
differentiated.

Where a schedule has forward and backward alone, a stage holds the inputs of its parts, and computes
each part again in its backward. Where gradients of weights have ticks of their own it holds what
they and backward need, as the policy of recomputation of the part says, and computes nothing twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax.parallel.mesh import STAGE
from lmjax.parallel.passes import Kept, Slot, SlotPasses
from lmjax.parallel.schedules import PipelineSchedule, Work
from lmjax.parallel.tick_tables import GRADIENT, KEPT, MORE, OUTPUT, WAYS, TickTables, lower

Parts = Any  # parameters of parts of the model, stacked
Shared = Any  # parameters that several stages use


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A model and its loss, cut for a pipeline, as pure functions.

    Attributes:
      enter: (shared, example) -> x, the first part's input.
      part: (params, shared, example, x, number) -> y, of x's type.
      leave: (shared, example, y) -> sums of the loss, which have the field `loss`.
      passes: (params, shared, example, number) -> passes of `part`, whose gradients of weights are
        those of (params, shared).
    """

    enter: Callable[[Shared, Any], jax.Array]
    part: Callable[[Any, Any, Any, jax.Array, jax.Array], jax.Array]
    leave: Callable[[Shared, Any, jax.Array], Any]
    passes: Callable[[Any, Shared, Any, jax.Array], SlotPasses]


def pipelined(
    schedule: PipelineSchedule,
    pieces: Pieces,
    params: Parts,
    shared: Shared,
    examples: Any,
    axes: Sequence[str] = (STAGE,),
) -> tuple[tuple[Parts, Shared], Any]:
    """Gradients of the summed loss of all microbatches, and the sums.

    To be called inside a `jax.shard_map` over `axes`.

    Args:
      schedule: of as many stages as the mesh has.
      pieces: the model and its loss.
      params: of this stage's chunks, stacked along a first axis.
      shared: all other parameters.
      examples: of each microbatch, along a first axis.
      axes: manual axes, `stage` among them; over the others the microbatches' rows are cut, and
        gradients and sums are added up once, after the last tick.

    Returns:
      ((d_params, d_shared), sums): all but d_params added over the stages.
    """
    tables, axes = lower(schedule), tuple(axes)
    params, shared, examples = vary((params, shared, examples), axes)
    several = schedule.chunks > 1
    if not several:  # sums are added up in place where they have no axis of one chunk
        params = get(params, 0)
    kind = _SplitStage if schedule.split else _Stage
    stage = kind(schedule, pieces, params, shared, examples, axes)
    names = [field.name for field in dataclasses.fields(tables) if field.name != "slots"]
    rows = {name: jax.tree.map(jnp.asarray, getattr(tables, name)) for name in names}
    carry, _ = jax.lax.scan(stage.tick, stage.start(tables), rows)
    d_params = carry["params"] if several else jax.tree.map(lambda a: a[None], carry["params"])
    if others := tuple(axis for axis in axes if axis != STAGE):
        d_params = jax.lax.psum(d_params, others)
    d_shared, sums = jax.lax.psum((carry["shared"], carry["sums"]), axes)
    return (d_params, d_shared), sums


def evaluated(
    stages: int,
    pieces: Pieces,
    params: Parts,
    shared: Shared,
    examples: Any,
    axes: Sequence[str] = (STAGE,),
) -> Any:
    """Sums of the loss of all microbatches, without gradients, as `pipelined`.

    Args:
      stages: of the pipeline, one part on each.
      params: of this stage's part.
    """
    axes = tuple(axes)
    params, shared, examples = vary((params, shared, examples), axes)
    stage = jax.lax.axis_index(STAGE)
    microbatches = len(jax.tree.leaves(examples)[0])
    x, sums = _shapes(pieces, shared, get(examples, 0))

    def work(carry, microbatch):
        example, (x, sums) = get(examples, microbatch), carry
        enter = lambda x: vary(pieces.enter(shared, example), axes)  # noqa: E731
        x = jax.lax.cond(stage == 0, enter, lambda x: x, x)
        y = pieces.part(params, shared, example, x, stage)
        leave = lambda sums: plus(sums, vary(pieces.leave(shared, example, y), axes))  # noqa: E731
        return vary((y, jax.lax.cond(stage == stages - 1, leave, lambda sums: sums, sums)), axes)

    def tick(carry, at):
        microbatch = at - stage
        busy = (microbatch >= 0) & (microbatch < microbatches)
        x, sums = jax.lax.cond(busy, work, lambda carry, _: carry, carry, microbatch)
        pairs = [(one, (one + 1) % stages) for one in range(stages)]
        return (jax.lax.ppermute(x, STAGE, pairs), sums), None

    start = vary((zeros(x), zeros(sums)), axes)
    (_, sums), _ = jax.lax.scan(tick, start, jnp.arange(microbatches + stages - 1))
    return jax.lax.psum(sums, axes)


def _shapes(pieces: Pieces, shared: Shared, example: Any) -> tuple[Any, Any]:
    """Types of the first part's input and of the sums."""
    x = jax.eval_shape(pieces.enter, shared, example)
    return x, jax.eval_shape(pieces.leave, shared, example, x)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Work of one tick, as traced integers; see `TickTables`."""

    part: jax.Array
    microbatch: jax.Array
    source: jax.Array
    cotangent: jax.Array
    kept: jax.Array
    more: jax.Array


@dataclasses.dataclass(frozen=True)
class _Stage:
    """The work of a stage that computes parts again; fields are the arguments of `pipelined`."""

    schedule: PipelineSchedule
    pieces: Pieces
    params: Any
    shared: Any
    examples: Any
    axes: tuple[str, ...]

    def start(self, tables: TickTables) -> dict[str, Any]:
        """The carry before the first tick: empty slots, gradients and sums of zero."""
        x, sums = _shapes(self.pieces, self.shared, self.example(0))
        kept, more, entries = self.keeps()
        carry = {
            "sources": zeros(x, max(1, tables.slots[OUTPUT])),
            "cotangents": zeros(x, max(1, tables.slots[GRADIENT])),
            "kept": zeros(kept, max(1, tables.slots[KEPT]), *entries),
            "more": zeros(more, tables.slots[MORE], *entries),
            "output": zeros(x),
            "gradient": zeros(x),
            **{way: zeros(x) for way in WAYS},
            "params": zeros(self.params),
            "shared": zeros(self.shared),
            "sums": zeros(sums),
        }
        return vary(carry, self.axes)

    def keeps(self) -> tuple[Any, Any, tuple[int, ...]]:
        """Types of what forward and backward keep of an entry of a slot, and numbers of entries."""
        entries: tuple[int, ...] = ()

        def once(params, shared, example) -> tuple[Kept, Kept]:
            nonlocal entries
            passes = self.pieces.passes(params, shared, example, jnp.zeros((), jnp.int32))
            entries = passes.entries
            return passes.once(vary(self.pieces.enter(shared, example), self.axes))

        params = get(self.params, 0) if self.schedule.chunks > 1 else self.params
        return *jax.eval_shape(once, params, self.shared, self.example(0)), entries

    def tick(self, carry: dict[str, Any], rows: dict) -> tuple[dict[str, Any], None]:
        """Takes what has come, works, and sends."""
        stage = jax.lax.axis_index(STAGE)
        row = jax.tree.map(lambda a: a[stage], rows)
        carry = dict(carry)
        for way in WAYS:
            for kind, name in ((OUTPUT, "sources"), (GRADIENT, "cotangents")):
                slot = jnp.where(row["kind"][way] == kind, row["slot"][way], -1)
                carry[name] = put(carry[name], carry[way], slot)
        for kind, (do, written) in self.work.items():
            unit = _Unit(*(row[f.name][kind] for f in dataclasses.fields(_Unit)))
            carry = self.branch(unit.part >= 0, do, written, carry, unit)
        stages = self.schedule.stages
        for way, step in (("right", 1), ("left", -1), ("same", 0)):
            message = jnp.where(row["send"][way] == OUTPUT, carry["output"], carry["gradient"])
            if step:
                pairs = [(at, (at + step) % stages) for at in range(stages)]
                message = jax.lax.ppermute(message, STAGE, pairs)
            carry[way] = message
        return carry, None

    @property
    def work(self) -> dict[Work, tuple[Callable, Sequence[str]]]:
        """Functions of (carry, unit) and what they write, in the order in which a tick has them."""
        return {
            Work.FORWARD: (self.forward, ("output",)),
            Work.BACKWARD: (self.backward, ("gradient", "kept", "params", "shared", "sums")),
        }

    def branch(self, predicate, function, written, carry, *arguments) -> dict[str, Any]:
        """function(carry, *arguments) where the predicate holds, else the carry as it is.

        Only what the function writes goes through the conditional: what it reads is not copied.
        """

        def taken(own):
            found = function({**carry, **own}, *arguments)
            return vary({name: found[name] for name in written}, self.axes)

        own = {name: carry[name] for name in written}
        return {**carry, **jax.lax.cond(predicate, taken, lambda own: own, own)}

    def forward(self, carry: dict[str, Any], unit: _Unit) -> dict[str, Any]:
        """Makes the output of a part; of the last one it is made in backward."""
        example = self.example(unit.microbatch)

        def run(x):
            return self.pieces.part(self.chunk(unit), self.shared, example, x, unit.part)

        x = self.source(carry, unit, example)
        output = jax.lax.cond(self.is_last(unit), lambda x: x, lambda x: vary(run(x), self.axes), x)
        return {**carry, "output": output}

    def backward(self, carry: dict[str, Any], unit: _Unit) -> dict[str, Any]:
        """Makes the gradients of a part's input and of its weights."""
        example = self.example(unit.microbatch)

        passes, x = self.passes(unit), self.source(carry, unit, example)
        output, kept = passes.forward(x, Slot(carry["kept"], jnp.zeros((), jnp.int32)))
        gradient = get(carry["cotangents"], unit.cotangent)
        carry = {**carry, "kept": kept.arrays, "gradient": gradient}
        carry = self.left(carry, unit, example, output)
        carry["gradient"], found = passes.both(kept, carry["gradient"])
        carry = self.add(carry, unit, *found)
        return self.branch(unit.part == 0, self.enter, ("shared",), carry, example)

    def left(self, carry: dict, unit: _Unit, example: Any, output: jax.Array) -> dict[str, Any]:
        """`leave` after the last part."""
        written = "gradient", "shared", "sums"
        return self.branch(self.is_last(unit), self.leave, written, carry, example, output)

    def leave(self, carry: dict[str, Any], example: Any, output: jax.Array) -> dict[str, Any]:
        """Adds the sums of a microbatch, and makes the gradient of the last part's output."""

        def loss(shared, output):
            sums = self.pieces.leave(shared, example, output)
            return sums.loss, sums

        _, pull, sums = jax.vjp(loss, self.shared, output, has_aux=True)
        d_shared, d_output = pull(vary(jnp.ones_like(sums.loss), self.axes))
        carry = {**carry, "gradient": d_output, "sums": plus(carry["sums"], sums)}
        return {**carry, "shared": plus(carry["shared"], d_shared)}

    def enter(self, carry: dict[str, Any], example: Any) -> dict[str, Any]:
        """Adds the gradients of what the first part's input was made with."""
        _, pull = jax.vjp(lambda shared: self.pieces.enter(shared, example), self.shared)
        return {**carry, "shared": plus(carry["shared"], pull(carry["gradient"])[0])}

    def source(self, carry: dict[str, Any], unit: _Unit, example: Any) -> jax.Array:
        """Input of a part."""
        return jax.lax.cond(
            unit.part == 0,
            lambda kept: vary(self.pieces.enter(self.shared, example), self.axes),
            lambda kept: kept,
            get(carry["sources"], unit.source),
        )

    def passes(self, unit: _Unit) -> SlotPasses:
        """The passes of a part."""
        example = self.example(unit.microbatch)
        return self.pieces.passes(self.chunk(unit), self.shared, example, unit.part)

    def is_last(self, unit: _Unit) -> jax.Array:
        """Returns whether the model ends with a part."""
        return unit.part == len(self.schedule.holder) - 1

    def chunk(self, unit: _Unit) -> Any:
        """Parameters of a part."""
        several = self.schedule.chunks > 1
        return get(self.params, unit.part // self.schedule.stages) if several else self.params

    def example(self, microbatch: jax.Array | int) -> Any:
        """The example of a microbatch."""
        return get(self.examples, microbatch)

    def add(self, carry: dict[str, Any], unit: _Unit, d_part: Any, d_shared: Any) -> dict[str, Any]:
        """The carry with a part's gradients added."""
        if self.schedule.chunks > 1:
            slot = Slot(carry["params"], unit.part // self.schedule.stages)
            params = slot.written(plus(slot.read(), d_part)).arrays
        else:
            params = plus(carry["params"], d_part)
        return {**carry, "params": params, "shared": plus(carry["shared"], d_shared)}


class _SplitStage(_Stage):
    """The work of a stage that keeps what later work needs, and computes nothing twice."""

    @property
    def work(self) -> dict[Work, tuple[Callable, Sequence[str]]]:
        """See `_Stage.work`."""
        own = "output", "gradient", "cotangents", "kept", "shared", "sums"
        return {
            Work.FORWARD: (self.forward, own),
            Work.BACKWARD: (self.backward, ("gradient", "more", "shared")),
            Work.WEIGHTS: (self.weights, ("params", "shared")),
        }

    def forward(self, carry: dict[str, Any], unit: _Unit) -> dict[str, Any]:
        """Makes the output of a part; of the last one the loss, and the output's gradient."""
        example = self.example(unit.microbatch)
        x = self.source(carry, unit, example)
        output, kept = self.passes(unit).forward(x, Slot(carry["kept"], unit.kept))
        carry = {**carry, "output": output, "kept": kept.arrays}
        carry = self.left(carry, unit, example, output)
        slot = jnp.where(self.is_last(unit), unit.cotangent, -1)
        return {**carry, "cotangents": put(carry["cotangents"], carry["gradient"], slot)}

    def backward(self, carry: dict[str, Any], unit: _Unit) -> dict[str, Any]:
        """Makes the gradient of a part's input."""
        kept, more = Slot(carry["kept"], unit.kept), Slot(carry["more"], unit.more)
        d_output = get(carry["cotangents"], unit.cotangent)
        carry["gradient"], more = self.passes(unit).backward(kept, more, d_output)
        carry["more"] = more.arrays
        example = self.example(unit.microbatch)
        return self.branch(unit.part == 0, self.enter, ("shared",), carry, example)

    def weights(self, carry: dict[str, Any], unit: _Unit) -> dict[str, Any]:
        """Makes the gradients of a part's weights."""
        kept, more = Slot(carry["kept"], unit.kept), Slot(carry["more"], unit.more)
        return self.add(carry, unit, *self.passes(unit).weights(kept, more))


def vary(tree: Any, axes: Sequence[str]) -> Any:
    """Arrays typed as varying over these manual axes, whatever they varied over before."""

    def cast(a):
        missing = tuple(sorted(set(axes) - jax.typeof(a).manual_axis_type.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


def get(stacked: Any, index: jax.Array | int) -> Any:
    """Number `index` along the first axis of each array; of -1 any."""
    index = jnp.maximum(index, 0)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)


def put(slots: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    """The slots with a value at an index; unchanged at -1."""
    at = jnp.maximum(index, 0)
    value = jnp.where(index >= 0, value, jax.lax.dynamic_index_in_dim(slots, at, keepdims=False))
    return jax.lax.dynamic_update_index_in_dim(slots, value, at, 0)


def zeros(like: Any, *more: int) -> Any:
    """Zeros of the types of a tree's arrays, with further axes before theirs."""

    def make(a):
        spec = P(*(None,) * len(more), *jax.typeof(a).sharding.spec)
        return jnp.zeros((*more, *a.shape), a.dtype, out_sharding=spec)

    return jax.tree.map(make, like)


def plus(total: Any, part: Any) -> Any:
    """The sums of two trees."""
    return jax.tree.map(jnp.add, total, part)
