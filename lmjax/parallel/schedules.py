"""Pipeline schedules: which stage does what at each tick, made and checked without a device.

A model is cut into parts, in order; a stage holds one part, or several (its chunks). A microbatch
goes forward through all parts and its gradient back. What a stage makes in a tick its neighbours
have at the next one, so that all stages go through the ticks together and a tick lasts as long as
the longest work in it. Where forward and backward take unlike times, work of one kind is therefore
done in the same ticks by all: in the steady state of 1f1b every tick has one of each.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from lmjax.config import UserError

Name = Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"]


class Work(enum.IntEnum):
    """Kinds of work on a microbatch."""

    FORWARD = 1
    BACKWARD = 2  # gradients of the inputs; of the weights too, where these have no own ticks
    WEIGHTS = 3  # gradients of the weights


class Unit(NamedTuple):
    """Work on one microbatch in one part of the model."""

    work: Work
    part: int
    microbatch: int


Units = tuple[Unit, ...]  # of one stage in one tick, in this order


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """The work of every stage at every tick.

    Attributes:
      name: of the schedule.
      stages: of the pipeline.
      microbatches: of a step.
      holder: the stage that holds each part of the model.
      split: whether gradients of weights have ticks of their own.
      ticks: for each tick the work of each stage.
    """

    name: Name
    stages: int
    microbatches: int
    holder: tuple[int, ...]
    split: bool
    ticks: tuple[tuple[Units, ...], ...]

    @property
    def chunks(self) -> int:
        """Parts that each stage holds."""
        return len(self.holder) // self.stages

    @functools.cached_property
    def when(self) -> dict[Unit, int]:
        """The tick of every unit of work."""
        ticks = enumerate(self.ticks)
        return {unit: tick for tick, row in ticks for units in row for unit in units}

    @property
    def live(self) -> tuple[int, ...]:
        """Most microbatches that each stage holds activations of at once, its chunks counted."""
        return self._most(Work.FORWARD, Work.WEIGHTS if self.split else Work.BACKWARD)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Most whose gradients of weights each stage has put off at once, its chunks counted."""
        return self._most(Work.BACKWARD, Work.WEIGHTS) if self.split else (0,) * self.stages

    def _most(self, first: Work, last: Work) -> tuple[int, ...]:
        """Most microbatches of each stage at once from one kind of work to another."""
        most = []
        for stage in range(self.stages):
            held = peak = 0
            for unit in (unit for row in self.ticks for unit in row[stage]):
                held += unit.work is first
                peak = max(peak, held)
                held -= unit.work is last
            most.append(peak)
        return tuple(most)

    def duration(self, forward: float, backward: float, weights: float) -> float:
        """Time of a step, in the unit of the arguments.

        Args:
          forward: time of a microbatch's forward pass through one part.
          backward: of the gradients of the part's inputs, recomputation included.
          weights: of the gradients of its weights.
        """
        costs = self.costs(forward, backward, weights)
        return sum(
            max(sum(costs[unit.work] for unit in units) for units in row) for row in self.ticks
        )

    def costs(self, forward: float, backward: float, weights: float) -> dict[Work, float]:
        """Time of each kind of work; see `duration`."""
        both = backward if self.split else backward + weights
        return {Work.FORWARD: forward, Work.BACKWARD: both, Work.WEIGHTS: weights}

    def bubble(self, forward: float = 1.0, backward: float = 1.0, weights: float = 1.0) -> float:
        """Share of a step in which a stage waits; see `duration`."""
        busy = self.chunks * self.microbatches * (forward + backward + weights)
        return 1 - busy / self.duration(forward, backward, weights)


def schedule(name: Name, stages: int, microbatches: int, chunks: int = 2) -> PipelineSchedule:
    """The schedule of a name.

    gpipe: all forward, then all backward (Huang et al. 2019, arXiv:1811.06965).
    1f1b: one forward and one backward in turn, so that what a stage holds does not grow with the
    microbatches (PipeDream-Flush; Narayanan et al. 2021, arXiv:2006.09503).
    interleaved: each stage holds `chunks` parts, and the bubble is that much shorter (Narayanan et
    al. 2021, arXiv:2104.04473, section 2.2).
    zb_h1: 1f1b whose gradients of weights fill the bubble (Qi et al. 2024, arXiv:2401.10241).
    zb_v: two chunks on each stage, the second in the opposite direction (arXiv:2405.15362).

    With n microbatches, p stages, v chunks and times f, b, w of forward, of the gradients of inputs
    and of those of weights in one part, a step takes (n v + p - 1) (f + b + w), v = 1 for gpipe and
    1f1b. For f = b = w it takes (3 n + p - 1) f with zb_h1, and (6 n + p - 1) f with zb_v, whose
    parts are half as long. Stage s of 1f1b and interleaved holds p v + p - 1 - 2 s microbatches at
    most, one of the two others no more than p v.

    Args:
      name: of the schedule.
      stages: of the pipeline.
      microbatches: of a step.
      chunks: parts that a stage holds, of interleaved alone.

    Raises:
      UserError: too few microbatches, or a number that the schedule cannot take.
    """
    _check(name, stages, microbatches, chunks)
    if name == "zb_v":
        return _zb_v(stages, microbatches)
    if name == "zb_h1":
        orders = [_zb_h1(stages, microbatches, stage) for stage in range(stages)]
        return timed(name, microbatches, orders, tuple(range(stages)))
    return _paired(name, stages, microbatches, chunks if name == "interleaved" else 1)


def _check(name: str, stages: int, microbatches: int, chunks: int) -> None:
    if name not in (known := Name.__args__):
        raise UserError(f"schedule {name!r}: must be one of {', '.join(known)}")
    if stages < 1 or chunks < 1:
        raise UserError(f"schedule {name}: {stages} stages, {chunks} chunks: must be 1 or more")
    if microbatches < stages:
        raise UserError(
            f"schedule {name}: {microbatches} microbatches for {stages} stages: give at least as"
            " many microbatches as there are stages, or some always wait"
        )
    if name in ("interleaved", "zb_v") and microbatches % stages:
        raise UserError(
            f"schedule {name}: {microbatches} microbatches are no multiple of {stages} stages"
        )


def _paired(name: Name, stages: int, microbatches: int, chunks: int) -> PipelineSchedule:
    """A schedule whose ticks have at most one forward and one backward of a stage.

    A group of as many microbatches as there are stages goes through a chunk before it comes back to
    its first stage. Forward number k of stage s is at tick s + k; backward begins on the last stage
    with the first microbatch that has come through all parts, for gpipe with the last.
    """
    numbers, group = range(microbatches * chunks), stages if chunks > 1 else microbatches
    chunk = [number // group % chunks for number in numbers]
    microbatch = [number // (group * chunks) * group + number % group for number in numbers]
    first = microbatches + stages - 1 if name == "gpipe" else stages * chunks - 1
    ticks = [[() for _ in range(stages)] for _ in range(first + len(numbers) + stages - 1)]
    for stage, k in itertools.product(range(stages), numbers):
        forward = Unit(Work.FORWARD, chunk[k] * stages + stage, microbatch[k])
        ticks[stage + k][stage] += (forward,)
    for stage, k in itertools.product(range(stages), numbers):
        part = (chunks - 1 - chunk[k]) * stages + stage
        ticks[first + k + stages - 1 - stage][stage] += (Unit(Work.BACKWARD, part, microbatch[k]),)
    rows = tuple(tuple(row) for row in ticks)
    return PipelineSchedule(name, stages, microbatches, tuple(range(stages)) * chunks, False, rows)


def _zb_h1(stages: int, microbatches: int, stage: int) -> list[Unit]:
    """A stage's gradients of weights follow as many microbatches later as stages are before it."""
    ahead = min(microbatches, stages - stage)
    order = [Unit(Work.FORWARD, stage, m) for m in range(ahead)]
    for m in range(microbatches):
        order.append(Unit(Work.BACKWARD, stage, m))
        if m >= stage:
            order.append(Unit(Work.WEIGHTS, stage, m - stage))
        if m + ahead < microbatches:
            order.append(Unit(Work.FORWARD, stage, m + ahead))
    late = range(max(0, microbatches - stage), microbatches)
    return order + [Unit(Work.WEIGHTS, stage, m) for m in late]


def _zb_v(stages: int, microbatches: int) -> PipelineSchedule:
    """Each stage does at each tick the most urgent of what it can do."""
    parts = 2 * stages
    holder = tuple(min(part, parts - 1 - part) for part in range(parts))

    def urgency(unit: Unit) -> tuple[int, int]:
        late = unit.part >= stages
        order = {Work.BACKWARD: 0, Work.FORWARD: 1 if late else 3, Work.WEIGHTS: 2}
        return order[unit.work], not late

    return greedy("zb_v", microbatches, holder, urgency, most=parts)


def timed(
    name: Name, microbatches: int, orders: Sequence[Sequence[Unit]], holder: tuple[int, ...]
) -> PipelineSchedule:
    """The schedule of stages that do their work in these orders, one unit a tick, early as it can.

    Raises:
      ValueError: orders in which every stage waits for another.
    """
    done, at, ticks = set(), [0] * len(orders), []
    split = any(unit.work is Work.WEIGHTS for order in orders for unit in order)
    while any(index < len(order) for index, order in zip(at, orders)):
        row = []
        for stage, order in enumerate(orders):
            units = tuple(order[at[stage] : at[stage] + 1])
            ready = all(needs(unit, len(holder)) <= done for unit in units)
            row.append(units if ready else ())
        if not any(row):
            raise ValueError(f"schedule {name}: every stage waits for another at tick {len(ticks)}")
        done.update(unit for units in row for unit in units)
        at = [index + len(units) for index, units in zip(at, row)]
        ticks.append(tuple(row))
    return PipelineSchedule(name, len(orders), microbatches, holder, split, tuple(ticks))


def greedy(
    name: Name,
    microbatches: int,
    holder: tuple[int, ...],
    urgency: Callable[[Unit], tuple],
    most: int,
) -> PipelineSchedule:
    """A schedule, with gradients of weights apart, in which stages do what is most urgent.

    Args:
      name: of the schedule.
      microbatches: of a step.
      holder: the stage that holds each part.
      urgency: of a unit; the smallest is the most urgent.
      most: microbatches that a stage may hold activations of, each of its chunks counted.
    """
    parts, stages = len(holder), max(holder) + 1
    following = {(work, part): 0 for work in Work for part in range(parts)}
    done, held, ticks = set(), [0] * stages, []
    while len(done) < 3 * parts * microbatches:
        row = []
        for stage in range(stages):
            able = [
                unit
                for (work, part), m in following.items()
                if holder[part] == stage
                and m < microbatches
                and (work is not Work.FORWARD or held[stage] < most)
                and needs(unit := Unit(work, part, m), parts) <= done
            ]
            row.append((min(able, key=urgency),) if able else ())
        for stage, units in enumerate(row):
            for unit in units:
                done.add(unit)
                following[unit.work, unit.part] += 1
                held[stage] += (unit.work is Work.FORWARD) - (unit.work is Work.WEIGHTS)
        ticks.append(tuple(row))
    return PipelineSchedule(name, stages, microbatches, holder, True, tuple(ticks))


def needs(unit: Unit, parts: int) -> set[Unit]:
    """Work that must be done before: at an earlier tick, or on the same stage earlier in a tick."""
    work, part, m = unit
    if work is Work.FORWARD:
        return {Unit(Work.FORWARD, part - 1, m)} if part else set()
    if work is Work.WEIGHTS:
        return {Unit(Work.BACKWARD, part, m)}
    own = {Unit(Work.FORWARD, part, m)}
    return own | {Unit(Work.BACKWARD, part + 1, m)} if part < parts - 1 else own
