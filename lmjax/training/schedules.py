"""Learning-rate schedules: linear warm-up, then the shape that the class is named after.

Updates are counted from 1 as in the papers: update t = 1..warmup uses peak * t / warmup. The built
function takes the 0-based step that a training state holds, t = step + 1; a fraction of a step, as
`count_full_batches` makes them, stands for a batch that is not whole yet.
"""

import abc
import itertools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmjax.config import UserError, config

Step = Int[Array, "..."] | Float[Array, "..."] | int
Rate = Callable[[Step], Float[Array, "..."]]


@config
class Schedule(abc.ABC):
    """A learning rate for every step of a run."""

    @abc.abstractmethod
    def build(self, steps: int) -> Rate:
        """The learning rate as a function of the 0-based step (an integer, may be traced).

        Args:
          steps: length of the run in updates; shapes that end, end there.

        Raises:
          UserError: the shape does not fit into that many steps.
        """


@config
class Constant(Schedule):
    """Warm-up, then the peak for ever."""

    peak: float = 6e-4  # learning rate after the warm-up
    warmup: int = 100  # steps of linear warm-up

    def validate(self) -> None:
        """Raises UserError for numbers that make no schedule."""
        _check(self)

    def build(self, steps: int) -> Rate:
        """See `Schedule.build`."""
        _check(self, steps)
        return lambda step: self.peak * _warm(step, self.warmup)


@config
class Cosine(Schedule):
    """Warm-up, half a cosine down to a share of the peak, then flat (arXiv 1608.03983)."""

    peak: float = 6e-4  # highest learning rate
    warmup: int = 100  # steps of linear warm-up
    final: float = 0.1  # learning rate after the fall, as a share of the peak
    # update at which the fall is over, in the run or after it; none: the last
    end: int | None = None

    def validate(self) -> None:
        """Raises UserError for numbers that make no schedule."""
        _check(self)
        _check_end(self)

    def build(self, steps: int) -> Rate:
        """See `Schedule.build`."""
        _check(self, steps)
        end = self.end or steps

        def rate(step):
            fall = (1 - jnp.cos(jnp.pi * _progress(step, self.warmup, end))) / 2
            return self.peak * _warm(step, self.warmup) * (1 - (1 - self.final) * fall)

        return rate


@config
class Linear(Schedule):
    """Warm-up, a straight line down to a share of the peak, then flat."""

    peak: float = 6e-4  # highest learning rate
    warmup: int = 100  # steps of linear warm-up
    final: float = 0.0  # learning rate after the fall, as a share of the peak
    # update at which the fall is over, in the run or after it; none: the last
    end: int | None = None

    def validate(self) -> None:
        """Raises UserError for numbers that make no schedule."""
        _check(self)
        _check_end(self)

    def build(self, steps: int) -> Rate:
        """See `Schedule.build`."""
        _check(self, steps)
        end = self.end or steps

        def rate(step):
            fall = _progress(step, self.warmup, end)
            return self.peak * _warm(step, self.warmup) * (1 - (1 - self.final) * fall)

        return rate


@config
class InverseSquareRoot(Schedule):
    """Warm-up, then peak * sqrt(start / t) (arXiv 1706.03762; with warmup=0, T5's and PaLM's)."""

    peak: float = 1e-2  # highest learning rate
    warmup: int = 0  # steps of linear warm-up
    start: int = 10_000  # update at which the fall begins; never before the warm-up's end

    def validate(self) -> None:
        """Raises UserError for numbers that make no schedule."""
        _check(self)
        if self.start < 1:
            raise UserError(f"InverseSquareRoot.start={self.start}: updates are counted from 1")

    def build(self, steps: int) -> Rate:
        """See `Schedule.build`."""
        _check(self, steps)
        start = max(self.start, self.warmup)

        def rate(step):
            fall = jnp.sqrt(start / jnp.maximum(_update(step), start))
            return self.peak * _warm(step, self.warmup) * fall

        return rate


@config
class WarmupStableDecay(Schedule):
    """Warm-up, the peak, and a decay over the last part of the run (arXiv 2404.06395)."""

    peak: float = 6e-4  # learning rate between warm-up and decay
    warmup: int = 100  # steps of linear warm-up
    decay: float = 0.2  # share of all steps, at the end, over which the rate falls
    final: float = 0.0  # learning rate of the last step, as a share of the peak
    # how the rate falls; sqrt is 1 - sqrt(progress) (arXiv 2405.18392)
    shape: Literal["linear", "cosine", "sqrt"] = "linear"

    def validate(self) -> None:
        """Raises UserError for numbers that make no schedule."""
        _check(self)
        if not 0 <= self.decay <= 1:
            raise UserError(
                f"WarmupStableDecay.decay={self.decay}: a share of the run lies between 0 and 1"
            )

    def build(self, steps: int) -> Rate:
        """See `Schedule.build`."""
        _check(self, steps)
        begin = steps - round(self.decay * steps)
        if begin < self.warmup:
            raise UserError(
                f"WarmupStableDecay: warmup={self.warmup} and decay={self.decay} of {steps} steps"
                f" ({steps - begin}) overlap; together they may take at most all {steps}"
            )

        def rate(step):
            done = _progress(step, begin, steps)
            if self.shape == "cosine":
                done = (1 - jnp.cos(jnp.pi * done)) / 2
            elif self.shape == "sqrt":
                done = jnp.sqrt(done)
            return self.peak * _warm(step, self.warmup) * (1 - (1 - self.final) * done)

        return rate


@config
class Restarts(Schedule):
    """Another schedule, begun anew at some steps: re-warmed and decayed again (arXiv 1608.03983).

    For text that comes in one run after other text, as data.stages has it.
    """

    schedule: Schedule  # of each stretch, which is a run of its own for it
    first_steps: tuple[int, ...]  # 0-based steps at which it begins anew, such as those of stages

    def validate(self) -> None:
        """Raises UserError for steps that do not rise."""
        steps = list(self.first_steps)
        if not steps or steps != sorted(set(steps)) or steps[0] < 1:
            raise UserError(f"Restarts.first_steps={steps}: one step or more, which rise from 1")

    def build(self, steps: int) -> Rate:
        """See `Schedule.build`."""
        if self.first_steps[-1] >= steps:
            raise UserError(
                f"Restarts.first_steps={list(self.first_steps)}: the run has {steps} steps"
            )
        edges = (0, *self.first_steps, steps)
        rates = [self.schedule.build(end - first) for first, end in itertools.pairwise(edges)]

        def rate(step):
            found = rates[0](step)
            for first, later in zip(self.first_steps, rates[1:], strict=True):
                found = jnp.where(step >= first, later(jnp.maximum(step - first, 0)), found)
            return found

        return rate


def count_full_batches(rate: Rate, table: tuple[tuple[int, int], ...]) -> Rate:
    """The rate by step where `rate` goes by batches of full size, of which a step is a part.

    So a schedule that was published in tokens or samples keeps its shape while the batch grows.

    Args:
      rate: by 0-based number of the full batch.
      table: (first step, rows of a batch from there on), by rising step from 0; the last are full.
    """
    first, rows = np.array(table).T
    full = rows[-1]
    before = np.concatenate([[0], np.cumsum(np.diff(first) * rows[:-1])]) / full

    def by_step(step: Step) -> Float[Array, "..."]:
        step = jnp.asarray(step, jnp.float32)
        which = jnp.searchsorted(jnp.asarray(first, jnp.float32), step, side="right") - 1
        share = jnp.asarray(rows / full, jnp.float32)[which]
        # The rate of an update is that at its end: update t of full batches is the 0-based t - 1.
        inside = (step + 1 - jnp.asarray(first, jnp.float32)[which]) * share
        return rate(jnp.asarray(before, jnp.float32)[which] + inside - 1)

    return by_step


def piecewise_linear(points: tuple[tuple[int, float], ...]) -> Rate:
    """Straight lines from point to point: a value by step, flat before the first and from the last.

    Args:
      points: (0-based step, value), one or more, by rising step.
    """
    steps, values = np.array(points, np.float32).T
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), steps, values)


def _check(schedule: Schedule, steps: int | None = None) -> None:
    """Raises UserError for a peak, warm-up or final share that cannot be meant."""
    name = type(schedule).__name__
    if schedule.peak <= 0:
        raise UserError(f"{name}.peak={schedule.peak}: a learning rate is a number above 0")
    if schedule.warmup < 0:
        raise UserError(f"{name}.warmup={schedule.warmup}: a number of steps is 0 or more")
    if not 0 <= (final := getattr(schedule, "final", 0.0)) <= 1:
        raise UserError(f"{name}.final={final}: a share of the peak lies between 0 and 1")
    if steps is not None and steps < 1:
        raise UserError(f"{name}: a run of {steps} steps has no learning rate; 1 or more")
    if steps is not None and schedule.warmup > steps:
        raise UserError(
            f"{name}.warmup={schedule.warmup} is longer than the run of {steps} steps:"
            " lower warmup or raise steps"
        )


def _check_end(schedule: Cosine | Linear) -> None:
    """Raises UserError for a fall that is over before it begins."""
    if schedule.end is not None and schedule.end <= schedule.warmup:
        raise UserError(
            f"{type(schedule).__name__}.end={schedule.end}: the fall begins after the"
            f" warmup={schedule.warmup} and ends later than that"
        )


def _update(step: Step) -> Float[Array, "..."]:
    """Number of the update, from 1, as a float32 (exact up to 2^24 updates)."""
    return jnp.asarray(step, jnp.float32) + 1


def _warm(step: Step, warmup: int) -> Float[Array, "..."]:
    """Factor of the warm-up: t / warmup, then 1."""
    return jnp.minimum(1.0, _update(step) / max(warmup, 1))


def _progress(step: Step, begin: int, end: int) -> Float[Array, "..."]:
    """0 up to update `begin`, 1 from update `end` on, a straight line between."""
    return jnp.clip((_update(step) - begin) / max(end - begin, 1), 0, 1)
