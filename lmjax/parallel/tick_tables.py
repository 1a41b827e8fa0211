"""A schedule of a pipeline as tables of integers, which a compiled program can look up."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from lmjax.parallel.schedules import PipelineSchedule, Work

OUTPUT, GRADIENT = 1, 2  # kinds of messages; 0: none
WAYS = ("right", "left", "same")  # to the next stage, the one before, and to another chunk here


@dataclasses.dataclass(frozen=True)
class TickTables:
    """A schedule in integers: arrays [ticks, stages], by the kind of work or by the way.

    Attributes:
      part, microbatch: the work; a part of -1 is none.
      source, cotangent: slots of the activation (or of all that backward needs) and of the gradient
        that the work reads; -1: it is made on the spot, by the first and by the last part.
      send: kind of message that leaves in each way at the end of the tick.
      kind, slot: of the message that has come in each way: where it is kept.
      sources, cotangents: slots that a stage has.
    """

    part: dict[Work, np.ndarray]
    microbatch: dict[Work, np.ndarray]
    source: dict[Work, np.ndarray]
    cotangent: dict[Work, np.ndarray]
    send: dict[str, np.ndarray]
    kind: dict[str, np.ndarray]
    slot: dict[str, np.ndarray]
    sources: int
    cotangents: int


def lower(schedule: PipelineSchedule) -> TickTables:
    """The tables of a schedule, with a slot for each activation and gradient while it is needed."""

    def table(keys, fill: int) -> dict[Any, np.ndarray]:
        shape = len(schedule.ticks), schedule.stages
        return {key: np.full(shape, fill, np.int32) for key in keys}

    part_of, microbatch, source, cotangent = (table(Work, -1) for _ in range(4))
    send, kind_of, slot = table(WAYS, 0), table(WAYS, 0), table(WAYS, -1)
    when = schedule.when
    slots = {kind: _allocate(schedule, kind) for kind in (OUTPUT, GRADIENT)}
    for (work, part, m), tick in when.items():
        at = tick, schedule.holder[part]
        part_of[work][at], microbatch[work][at] = part, m
        source[work][at] = slots[OUTPUT].get((part, m), -1)
        cotangent[work][at] = slots[GRADIENT].get((part, m), -1)
        step = {Work.FORWARD: 1, Work.BACKWARD: -1, Work.WEIGHTS: 0}[work]
        if not step or not 0 <= part + step < len(schedule.holder):
            continue
        kind, to = OUTPUT if step > 0 else GRADIENT, schedule.holder[part + step]
        way = _way(at[1], to, step, schedule.stages)
        send[way][at] = kind_of[way][tick + 1, to] = kind
        slot[way][tick + 1, to] = slots[kind][part + step, m]
    counts = (max(slots[kind].values(), default=-1) + 1 for kind in (OUTPUT, GRADIENT))
    return TickTables(part_of, microbatch, source, cotangent, send, kind_of, slot, *counts)


def _way(stage: int, to: int, step: int, stages: int) -> str:
    """The way of a message from a stage to one, forward (`step` of 1) or backward (-1)."""
    if to == stage:
        return "same"
    along, against = ("right", "left") if step > 0 else ("left", "right")
    return along if to == (stage + step) % stages else against


def _allocate(schedule: PipelineSchedule, kind: int) -> dict[tuple[int, int], int]:
    """A slot for each (part, microbatch) that no other has while it is needed.

    An activation is needed from its arrival until backward, or the gradients of weights, are done;
    a gradient from its arrival, or of the last part from its backward, if weights come later.
    """
    parts, when, needed = len(schedule.holder), schedule.when, []
    final = Work.WEIGHTS if schedule.split else Work.BACKWARD
    for part, m in itertools.product(range(parts), range(schedule.microbatches)):
        end = when[final, part, m]
        if kind == OUTPUT and part:
            needed.append((when[Work.FORWARD, part - 1, m] + 1, end, part, m))
        if kind == GRADIENT and part < parts - 1:
            needed.append((when[Work.BACKWARD, part + 1, m] + 1, end, part, m))
        if kind == GRADIENT and part == parts - 1 and schedule.split:
            needed.append((when[Work.BACKWARD, part, m], end, part, m))
    slots: dict[tuple[int, int], int] = {}
    ends: list[list[int]] = [[] for _ in range(schedule.stages)]  # of each slot's last use
    for start, end, part, m in sorted(needed):
        own = ends[schedule.holder[part]]
        free = next((slot for slot, busy in enumerate(own) if busy < start), len(own))
        own[free : free + 1] = [end]
        slots[part, m] = free
    return slots
