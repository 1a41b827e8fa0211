"""A schedule of a pipeline as tables of integers, which a compiled program can look up."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from lmjax.parallel.schedules import PipelineSchedule, Work

OUTPUT, GRADIENT = 1, 2  # kinds of messages; 0: none
KEPT, MORE = 3, 4  # kinds of what stays on a stage, where gradients of weights have own ticks
WAYS = ("right", "left", "same")  # to the next stage, the one before, and to another chunk here


@dataclasses.dataclass(frozen=True)
class TickTables:
    """A schedule in integers: arrays [ticks, stages], by the kind of work or by the way.

    Attributes:
      part, microbatch: the work; a part of -1 is none.
      source, cotangent: slots of the activation and of the gradient that the work reads; -1: it is
        made on the spot, by the first and by the last part.
      kept, more: slots of what forward and what backward keep for later work, where gradients of
        weights have ticks of their own; forward of the last part also writes its `cotangent`.
      send: kind of message that leaves in each way at the end of the tick.
      kind, slot: of the message that has come in each way: where it is kept.
      slots: of each kind that a stage has.
    """

    part: dict[Work, np.ndarray]
    microbatch: dict[Work, np.ndarray]
    source: dict[Work, np.ndarray]
    cotangent: dict[Work, np.ndarray]
    kept: dict[Work, np.ndarray]
    more: dict[Work, np.ndarray]
    send: dict[str, np.ndarray]
    kind: dict[str, np.ndarray]
    slot: dict[str, np.ndarray]
    slots: dict[int, int]


def lower(schedule: PipelineSchedule) -> TickTables:
    """The tables of a schedule, with a slot for each activation and gradient while it is needed."""

    def table(keys, fill: int) -> dict[Any, np.ndarray]:
        shape = len(schedule.ticks), schedule.stages
        return {key: np.full(shape, fill, np.int32) for key in keys}

    part_of, microbatch = table(Work, -1), table(Work, -1)
    send, kind_of, slot = table(WAYS, 0), table(WAYS, 0), table(WAYS, -1)
    when = schedule.when
    slots = {kind: _allocate(schedule, kind) for kind in (OUTPUT, GRADIENT, KEPT, MORE)}
    read = {kind: table(Work, -1) for kind in slots}
    for (work, part, m), tick in when.items():
        at = tick, schedule.holder[part]
        part_of[work][at], microbatch[work][at] = part, m
        for kind, own in slots.items():
            read[kind][work][at] = own.get((part, m), -1)
        step = {Work.FORWARD: 1, Work.BACKWARD: -1, Work.WEIGHTS: 0}[work]
        if not step or not 0 <= part + step < len(schedule.holder):
            continue
        kind, to = OUTPUT if step > 0 else GRADIENT, schedule.holder[part + step]
        way = _way(at[1], to, step, schedule.stages)
        send[way][at] = kind_of[way][tick + 1, to] = kind
        slot[way][tick + 1, to] = slots[kind][part + step, m]
    counts = {kind: max(own.values(), default=-1) + 1 for kind, own in slots.items()}
    return TickTables(part_of, microbatch, *read.values(), send, kind_of, slot, counts)


def _way(stage: int, to: int, step: int, stages: int) -> str:
    """The way of a message from a stage to one, forward (`step` of 1) or backward (-1)."""
    if to == stage:
        return "same"
    along, against = ("right", "left") if step > 0 else ("left", "right")
    return along if to == (stage + step) % stages else against


def _allocate(schedule: PipelineSchedule, kind: int) -> dict[tuple[int, int], int]:
    """A slot for each (part, microbatch) that no other has while it is needed."""
    units = itertools.product(range(len(schedule.holder)), range(schedule.microbatches))
    needed = [(*span, *unit) for unit in units if (span := _span(schedule, kind, *unit))]
    slots: dict[tuple[int, int], int] = {}
    ends: list[list[int]] = [[] for _ in range(schedule.stages)]  # of each slot's last use
    for start, end, part, m in sorted(needed):
        own = ends[schedule.holder[part]]
        free = next((slot for slot, busy in enumerate(own) if busy < start), len(own))
        own[free : free + 1] = [end]
        slots[part, m] = free
    return slots


def _span(schedule: PipelineSchedule, kind: int, part: int, m: int) -> tuple[int, int] | None:
    """First and last tick in which a unit's slot of a kind is needed; None: it needs none.

    Where backward computes a part again, its input is needed until then; a gradient always. What
    forward and backward keep is needed until the gradients of weights are done. The last part makes
    its own gradient: in backward, or in forward where what backward needs is kept.
    """
    when, last = schedule.when, part == len(schedule.holder) - 1
    forward, backward = when[Work.FORWARD, part, m], when[Work.BACKWARD, part, m]
    if kind == OUTPUT:
        end = forward if schedule.split else backward
        return (when[Work.FORWARD, part - 1, m] + 1, end) if part else None
    if kind == GRADIENT and not last:
        return when[Work.BACKWARD, part + 1, m] + 1, backward
    if not schedule.split:
        return None
    end = backward if kind == GRADIENT else when[Work.WEIGHTS, part, m]
    return (backward if kind == MORE else forward), end
