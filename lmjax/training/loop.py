"""The training loop."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from lmjax.config import UserError
from lmjax.launch import report
from lmjax.training.interruption import Interruption
from lmjax.training.learner import Metrics
from lmjax.training.progress import Clock, Progress
from lmjax.training.state import TrainState

TRAINING = "training"  # what of a run the processes tell each other
Record = dict[str, Any]  # one line of metrics.jsonl
WITHOUT_TARGETS = ("gradient_norm", "learning_rate", "tokens")  # metrics that are no means of them
# (state, step) -> (state after that step, metrics, tokens that the model read).
Advance = Callable[[TrainState, int], tuple[TrainState, Metrics, int]]


class Diverged(UserError):
    """The loss, the gradient or a parameter is no longer a number."""


@dataclasses.dataclass(frozen=True)
class PerformanceTarget:
    """Reference values for the speed and the memory of a run.

    Attributes:
      flops_per_token: model FLOPs of one token of a batch, forward and backward.
      peak: FLOPs a second of all devices together; None where that is not known.
      memory: () -> most bytes that the fullest device has held so far.
    """

    flops_per_token: float
    peak: float | None
    memory: Callable[[], int]


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop from the first step of a run to its last.

    Attributes:
      advance: a step of the run. It takes over the state and may return before the devices are
        done.
      steps: number of steps of the whole run.
      write: takes a record for metrics.jsonl; the line is in the file when it returns.
      evaluate: (step, state) -> records of evaluations.
      is_evaluation: (step) -> whether to evaluate after it.
      save: (step, state) -> None; called every `save_every`, at the end, and on interruption. It
        may go on after it returns.
      target: for the MFU and the memory of each record.
      log_every: steps after which metrics are fetched from the devices, all at once.
      console: where progress is shown; None: the standard output.
      check_save: () -> None; called after every step: raises where the last save has failed.
      end_save: () -> None; called after the last step: returns when the last save is complete.
      counts: metric that says of how many targets a step's loss is.
      choose: (step, records) -> whether to save the state of an evaluation, as it is the best.
      is_over: () -> whether training ends after an evaluation, before its last step.
      finite: metrics that must be finite; training stops where one is not.
    """

    advance: Advance
    steps: int
    write: Callable[[Record], None]
    evaluate: Callable[[int, TrainState], list[Record]]
    is_evaluation: Callable[[int], bool]
    save: Callable[[int, TrainState], None]
    save_every: int
    target: PerformanceTarget
    log_every: int = 1
    console: Console | None = None
    check_save: Callable[[], None] = lambda: None
    end_save: Callable[[], None] = lambda: None
    counts: str = "tokens"
    choose: Callable[[int, list[Record]], bool] = lambda step, records: False
    is_over: Callable[[], bool] = lambda: False
    finite: tuple[str, ...] = ("loss", "gradient_norm")

    def run(self, state: TrainState, done: int) -> tuple[TrainState, int, Interruption]:
        """Trains from the state after `done` steps.

        Returns:
          The last state, the steps done in all, and whether and how the run was interrupted.

        Raises:
          Diverged: a loss, a gradient norm or a parameter is not finite, or a loss on held-out
            text. No such state is ever saved.
        """
        # The order below is what makes a continued run repeat every bit, and every line once:
        #   1. the batch of step n is a function of the data plan and n: there is nothing to seek;
        #   2. step n is dispatched, and while the devices work, step n - 1 is written down;
        #   3. the state after step n is evaluated, if that is due;
        #   4. a checkpoint of step n is begun only when every line up to n is in the file.
        # A run that goes on cuts the file back to the step of its checkpoint.
        clock = Clock()
        with ExitStack() as opened:
            progress = opened.enter_context(Progress(done, self.steps, self.console))
            interruption = opened.enter_context(Interruption())
            ledger, first = _PendingMetrics(self, clock, progress), done + 1
            opened.callback(report, TRAINING, None)
            for step in range(first, self.steps + 1):
                report(TRAINING, "the batch of step", step, 0)
                with clock.paused(when=step == first):  # this call compiles
                    state, metrics, tokens = self.advance(state, step)
                report(TRAINING, "step", step, 1)
                ledger.settle()
                ledger.add(step, metrics, tokens)
                self.check_save()
                stopping = step == self.steps or interruption.wished(step)
                evaluating = self.is_evaluation(step)
                saving = step % self.save_every == 0 or stopping
                if evaluating or saving:
                    ledger.settle(everything=True)
                with clock.paused():
                    if (evaluating or saving) and not _finite(state.params):
                        raise _diverged(step, "parameters are not finite")
                    if evaluating:
                        report(TRAINING, "the evaluation after step", step, 2)
                        with progress.doing("evaluating"):
                            records = self._evaluate(step, state, progress)
                        is_best = self.choose(step, records)
                        stopping = stopping or self.is_over()
                        saving = saving or is_best or stopping
                    if saving:
                        report(TRAINING, "the save after step", step, 3)
                        with progress.doing("saving"):
                            self.save(step, state)
                done = step
                if stopping:
                    break
            # Here, where a second Ctrl-C still ends the program at once.
            with progress.doing("writing the checkpoint"):
                self.end_save()
        return state, done, interruption

    def _evaluate(self, step: int, state: TrainState, progress: Progress) -> list[Record]:
        """Records of the evaluations after a step, which are in the file then."""
        records = self.evaluate(step, state)
        for record in records:
            self.write(record)
            progress.say(_held_out_line(record))
            if not math.isfinite(record.get("loss", 0.0)):
                raise _diverged(step, f"loss on {record['split']} is {record['loss']}")
        return records


class _PendingMetrics:
    """Metrics that are still on the devices, and when their steps were done."""

    def __init__(self, loop: Loop, clock: Clock, progress: Progress) -> None:
        self.loop, self.clock, self.progress = loop, clock, progress
        self.waiting: list[tuple[int, int, Metrics]] = []
        self.finished: list[tuple[int, int, Metrics, float]] = []
        self.last: float | None = None  # when the step before was done
        self.told = False  # whether a batch without targets was told of

    def add(self, step: int, metrics: Metrics, size: int) -> None:
        """Takes the metrics of a step that has just been dispatched, and its batch's tokens."""
        self.waiting.append((step, size, metrics))

    def settle(self, everything: bool = False) -> None:
        """Waits for the steps that have been added, and writes what is due.

        One step stays in flight while the one before is waited for here: the host is never more
        than one step ahead, and the devices never idle.
        """
        for step, size, metrics in self.waiting:
            jax.block_until_ready(metrics["loss"])
            self.finished.append((step, size, metrics, self.clock.seconds()))
        self.waiting.clear()
        if everything or len(self.finished) >= self.loop.log_every:
            fetched = jax.device_get([metrics for *_, metrics, _ in self.finished])
            for (step, size, _, seconds), metrics in zip(self.finished, fetched, strict=True):
                # Nine digits tell any two float32 numbers apart.
                numbers = {name: float(f"{value:.9g}") for name, value in metrics.items()}
                self.write(step, size, numbers, seconds)
            self.finished.clear()

    def write(self, step: int, size: int, metrics: dict[str, float], seconds: float) -> None:
        """One line of metrics.jsonl, and the live one.

        The model reads all tokens of a batch (`size`), and learns from those that have a weight. A
        batch in which none has a weight has no loss.
        """
        target, shown = self.loop.target, metrics
        if not metrics[self.loop.counts]:
            kept = (*WITHOUT_TARGETS, self.loop.counts)
            shown = {name: metrics[name] for name in kept if name in metrics}
            self.tell_of_no_targets(step)
        first = {"loss": metrics["loss"]} if "loss" in shown else {}
        record = {"step": step, "split": "train", **first, **shown}
        # The first step has begun at some moment of its compilation.
        if self.last is not None and seconds > self.last:
            taken = seconds - self.last
            record["tokens_per_second"] = round(metrics["tokens"] / taken, 1)
            if target.peak is not None:
                record["mfu"] = round(size * target.flops_per_token / taken / target.peak, 4)
        record["peak_memory"] = target.memory()
        self.last = seconds
        self.loop.write(record)
        self.progress.update(step, shown.get("loss"), metrics["tokens"], seconds)
        for name in self.loop.finite:
            if not math.isfinite(metrics[name]):
                raise _diverged(step, f"{name.replace('_', ' ')} is {metrics[name]}")

    def tell_of_no_targets(self, step: int) -> None:
        """Prints, the first time, that a batch had nothing to learn from."""
        if not self.told:
            self.progress.say(
                f"step {step:>7,}  the batch has nothing to learn from, such as a reply: there is "
                "no loss in metrics.jsonl, here and in later such steps"
            )
        self.told = True


@jax.jit
def _finite(params: Any) -> jax.Array | bool:
    """Returns whether all are finite: an update may overflow after a finite loss and gradient."""
    return jax.tree.reduce(lambda sound, leaf: sound & jnp.all(jnp.isfinite(leaf)), params, True)


def _diverged(step: int, what: str) -> Diverged:
    return Diverged(
        f"step {step}: the {what}, so training stops here; the last checkpoint is from before.\nA "
        "lower learning rate (schedule.peak), a longer warm-up (schedule.warmup) or gradient "
        "clipping (gradient_clip) usually helps."
    )


def _held_out_line(record: Record) -> str:
    """The numbers of an evaluation on one line; counts are left out."""
    name = record["split"].replace("held_out/", "held-out ")
    measures = [
        f"{measure.replace('_', ' ')} {value:.4f}"
        for measure, value in record.items()
        if isinstance(value, float)
    ]
    if "withheld" in record:
        measures.append("bits per byte withheld")
    return f"step {record['step']:>7,}  {name}: {', '.join(measures)}"
