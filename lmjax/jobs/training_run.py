"""A training run: a loop over a learner and a feed, in a run folder, from its start to its report.

The order of a run:
  1. the folder is locked, and its newest checkpoint found;
  2. the job prepares its data, and the evaluators what they need: mistakes are found now. The
     step is compiled meanwhile;
  3. the state is restored, or made;
  4. the loop trains, evaluates and saves (`lmjax.training.loop` has its order);
  5. the evaluators' tables go to results.json, the report and the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import UserError, fingerprint, to_json
from lmjax.console import RunLog, Stopwatch, Table, make_console
from lmjax.evaluation.evaluator import Context, Record
from lmjax.interop.beginning import check_beginning, parameters_fingerprint
from lmjax.interop.fisher_folder import read_fisher
from lmjax.interop.folder import read_params
from lmjax.jobs.begin_with import read_parameters
from lmjax.jobs.best import Selection
from lmjax.jobs.messages import (
    print_beginning,
    print_continuation,
    print_finished,
    print_interruption,
    print_results,
    print_trained,
)
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.teacher import check_tokens
from lmjax.launch import Limits, is_first, set_limits
from lmjax.objectives.elastic_weights import ANCHOR, FISHER
from lmjax.runs.checkpoints import BASE, BEST, Checkpointer
from lmjax.runs.environment import describe_environment
from lmjax.runs.folder import ENVIRONMENT, RESULTS, RunFolder
from lmjax.runs.metrics import MetricsWriter
from lmjax.scaling.flops import count_parameters
from lmjax.scaling.hardware import find_peak, peak_memory_in_use
from lmjax.training.feed import Feed
from lmjax.training.interruption import Interruption
from lmjax.training.learner import Learner
from lmjax.training.loop import Loop, PerformanceTarget
from lmjax.training.profiler import Profiler
from lmjax.training.state import TrainState


class TrainingRun:
    """One process's part in a run: begins it, or resumes it, and brings it to its end."""

    def __init__(self, job: Any, learner: Learner, folder: RunFolder) -> None:
        """A mesh must be set, the one that the learner was made for.

        Args:
          job: the settings, a `TrainingJob` (whose module imports this one).
          learner: `job.learner()`.
          folder: of the run, locked.
        """
        self.job, self.learner, self.folder = job, learner, folder
        self.parameters = count_parameters(job.model).total
        self.log = RunLog(make_console())
        self.watch = Stopwatch()
        self.frozen: dict[str, dict] | None = None  # parameters of `job.all_frozen_models`
        # Fingerprint of the parameters of `begin_with`, where checkpoints hold those that are
        # trained alone; None: they hold all.
        self.base: str | None = None
        self.results = Results.from_json(folder.results())

    def run(self) -> None:
        """See `TrainingJob.run`."""
        job, settings, late = self.job, self.job.checkpoint, self.job.watchdog
        set_limits(Limits(late.factor, late.least, late.first, late.end_after))
        with Checkpointer(
            self.folder.checkpoints, settings.keep, settings.keep_every, warn=self.log.warn
        ) as checkpointer:
            print_beginning(self.log, job, self.folder.location, self.parameters)
            print_trained(self.log, job, self.parameters)
            self.choose_from(checkpointer, checkpointer.latest_extra())
            if self.is_finished(checkpointer):
                print_finished(self.log, job.steps, self.folder.location, self.selection)
                print_results(self.log, self.results, self.folder.location)
                return
            checkpointer.check_folder()
            job.check_batches(checkpointer.latest() or 0)
            trains = not self.is_over(checkpointer.latest() or 0)
            self.frozen = self.read_frozen()
            # Before the examples are there, only the length that all of them have is known.
            ahead = trains and not job.lengths_vary
            compilation = self.compile_in_background() if ahead else None
            feed = job.prepare(self.folder, self.log, checkpointer.latest_extra())
            if job.distillation is not None:
                check_tokens(job.distillation, feed.tokenizer, self.log)
            self.prepare_evaluators(feed)
            state, first = self.begin_or_resume(checkpointer, feed)
            if compilation is not None:
                compilation.join()
            done = first
            if not self.is_over(done):
                state, done, interruption = self.train(state, done, checkpointer, feed)
            if not self.is_over(done):
                print_interruption(self.log, done, job.steps)
                sys.exit(interruption.exit_code)
            measured, params = self.chosen(state, done, checkpointer)
        del state
        self.finish(params, measured, first, done)

    def choose_from(self, checkpointer: Checkpointer, extra: dict[str, Any]) -> None:
        """Goes on with the choice of the best checkpoint where a checkpoint has left it."""
        self.selection = Selection(self.job.checkpoint.best, extra, checkpointer.steps())
        if self.selection.settings and BEST in extra and self.selection.best is None:
            self.log.warn("The best checkpoint is chosen anew: it is gone, or was chosen otherwise")

    def is_over(self, done: int) -> bool:
        """Returns whether no step is left to train, after `done` of them."""
        return done >= self.job.steps or self.selection.is_over

    def is_finished(self, checkpointer: Checkpointer) -> bool:
        """Returns whether the run came to its end before."""
        done = checkpointer.latest() or 0
        return self.is_over(done) and self.results.step >= min(done, self.job.steps)

    def chosen(self, state: TrainState, done: int, checkpointer: Checkpointer) -> tuple[int, dict]:
        """The parameters that the run ends with, the best or the last, and the step they are of."""
        best = self.selection.best
        if best is None or best.step == done:
            return done, self.learner.evaluated(state)
        entry = "params" if self.job.ema_decay is None else "average"
        restored, extra = checkpointer.restore(
            best.step, lambda extra: {entry: getattr(self.abstract(extra), entry)}
        )
        params = restored[entry]
        if BASE in extra:
            params = self.learner.trained.whole(params, state.params)
        return best.step, params

    def compile_in_background(self) -> threading.Thread:
        """Starts to compile the step; an error is left to the first step, which meets it again.

        The thread is no daemon: Python may not end while XLA compiles.
        """
        mesh, example = jax.sharding.get_mesh(), self.job.abstract_example()

        def compile_step() -> None:
            with contextlib.suppress(Exception), jax.set_mesh(mesh):
                self.learner.compile_step(example, self.frozen if self.learner.frozen else None)

        thread = threading.Thread(target=compile_step, name="compile the step")
        thread.start()
        return thread

    def read_frozen(self) -> dict[str, dict] | None:
        """Parameters of the models that are read and not trained; None where there are none.

        Of those that are the model that training begins with, the parameters that are trained
        alone: see `Learner.begun`.
        """
        models = self.job.all_frozen_models()
        found = {name: self.read_frozen_model(name, model) for name, model in models.items()}
        if (elastic := self.job.elastic) is not None:
            watch = Stopwatch()
            read = read_fisher(elastic.folder, self.job.model, self.learner.layout)
            found[ANCHOR], found[FISHER] = read
            words = f"{elastic.folder}, with strength {elastic.strength:g}"
            self.log.fact("kept near", words, watch.seconds())
        return found or None

    def read_frozen_model(self, name: str, model: Any) -> dict:
        """Parameters of one of the job's `all_frozen_models`."""
        watch, learner, words = Stopwatch(), self.learner, "frozen"
        params = read_params(model.folder, model.config, learner.layout, self.job.seed)
        if name in learner.begun:
            whole, params = params, learner.trained.of(params)
            if len(jax.tree.leaves(params)) < len(jax.tree.leaves(whole)):
                words = "frozen; those that are not trained are held once"
        self.log.fact(name, f"the parameters in {model.folder}, {words}", watch.seconds())
        return params

    def prepare_evaluators(self, feed: Feed) -> None:
        """Prepares all evaluators."""
        context = Context(self.learner, feed, self.folder.metrics, self.log, self.frozen)
        self.evaluators = [
            (evaluator, evaluator.prepare(context)) for evaluator in self.job.all_evaluators()
        ]
        if self.selection.settings and all(one.every is None for one, _ in self.evaluators):
            raise UserError("checkpoint.best: no evaluator has an interval, so nothing is compared")

    def begin_or_resume(self, checkpointer: Checkpointer, feed: Feed) -> tuple[TrainState, int]:
        """The state to train from and the number of steps done."""
        job, learner = self.job, self.learner
        restored = checkpointer.restore(None, self.abstract)
        environment = describe_environment()
        if restored is None:
            state, done = learner.init(job.seed, self.read_beginning(feed)), 0
            if job.begin_with is not None and learner.keeps_rest:
                self.base = parameters_fingerprint(job.begin_with)
        else:
            state, extra = restored
            done, self.base = extra["step"], extra.get(BASE)
            self.choose_from(checkpointer, extra)
            self.check_tokenizer(extra, feed)
            self.check_schedule(extra, done)
            if self.base is not None:
                check_beginning(job.begin_with, self.base, self.folder.location)
                state = learner.trained.with_rest(state, self.read_beginning(feed))
            print_continuation(self.log, job, extra, done)
        if is_first():
            self.folder.write_config(self.job)
            self.folder.write_json(ENVIRONMENT, environment)
        return state, done

    def abstract(self, extra: dict[str, Any]) -> TrainState:
        """The state as shapes with shardings, as a checkpoint with this `extra` holds it."""
        state = self.learner.abstract()
        if BASE not in extra:
            return state
        return dataclasses.replace(state, params=self.learner.trained.shapes(state.params))

    def read_beginning(self, feed: Feed) -> dict | None:
        """Parameters of `begin_with`; None where training begins with random ones."""
        job, log = self.job, self.log
        given = job.begin_with, self.learner, job.seed, feed.tokenizer, self.folder
        return read_parameters(*given, log)

    def save(self, checkpointer: Checkpointer, step: int, state: TrainState, extra: dict) -> None:
        """Saves what cannot be read again elsewhere."""
        if self.base is not None:
            state, extra = self.learner.trained.without_rest(state), extra | {BASE: self.base}
        checkpointer.save(step, state, extra | self.selection.extra)

    def check_tokenizer(self, extra: dict[str, Any], feed: Feed) -> None:
        """Raises UserError where the checkpoint's tokens mean something else."""
        now = None if feed.tokenizer is None else feed.tokenizer.fingerprint
        saved = extra.get("tokenizer")
        if saved != now:
            raise UserError(
                f"the checkpoint in {self.folder.checkpoints} was trained on the tokens of another "
                f"tokenizer: its fingerprint is {saved}, this one has {now}"
            )

    def check_schedule(self, extra: dict[str, Any], done: int) -> None:
        """Raises UserError where the steps done had other rates than this job gives them."""
        before, now = extra["steps"], self.job.steps
        steps = jnp.arange(done)
        old, new = (np.asarray(self.job.rate(n)(steps)) for n in (before, now))
        # A schedule that does not look at the number of steps gives the very same numbers.
        if not np.array_equal(old, new):
            first = int(np.argmax(old != new))
            raise UserError(
                f"steps={now}: {done:,} steps were trained for a run of {before:,}, and "
                f"{type(self.job.schedule).__name__} gives a run of {now:,} other rates "
                f"from step {first + 1:,} on. Go on with steps={before}, or choose another output "
                "folder (schedule=Constant, InverseSquareRoot and the stable part of "
                "WarmupStableDecay can be extended)."
            )

    def train(
        self, state: TrainState, done: int, checkpointer: Checkpointer, feed: Feed
    ) -> tuple[TrainState, int, Interruption]:
        """Runs the loop; see `Loop.run`."""
        job, learner = self.job, self.learner
        extra = {
            "experiment": json.loads(to_json(job)),
            "environment": describe_environment(),
            "steps": job.steps,
            **feed.identity,
        }
        with ExitStack() as opened:
            examples = opened.enter_context(feed.examples(done))
            metrics = opened.enter_context(self.open_metrics())
            metrics.truncate_after(done)

            advance = job.advance(learner, feed, examples, self.frozen)
            if job.log.profile is not None:
                profiler = opened.enter_context(Profiler(self.folder.profile, *job.log.profile))
                advance = profiler.traced(advance)
            loop = Loop(
                advance=advance,
                steps=job.steps,
                write=metrics.write,
                evaluate=self.evaluate,
                is_evaluation=self.is_evaluation,
                save=lambda step, state: self.save(checkpointer, step, state, extra),
                save_every=job.checkpoint.every,
                target=self.target(),
                log_every=job.log.every,
                console=self.log.console,
                check_save=checkpointer.check,
                end_save=checkpointer.wait,
                counts=job.objective.counts,
                choose=self.choose,
                is_over=lambda: self.selection.is_over,
            )
            return loop.run(state, done)

    def target(self) -> PerformanceTarget:
        """FLOPs of the model and the peak of the devices."""
        peak = find_peak()
        self.log.fact("peak", peak.note)
        return PerformanceTarget(self.job.flops_per_token(), peak.flops, peak_memory_in_use)

    def open_metrics(self) -> MetricsWriter:
        """metrics.jsonl and its copies."""
        log = self.job.log
        wandb = None
        if log.wandb is not None:
            name = fingerprint(self.job)
            wandb = {"project": log.wandb, "name": self.folder.path.name, "id": name}
        return MetricsWriter(self.folder.path, log.tensorboard, wandb)

    def is_evaluation(self, step: int) -> bool:
        """Returns whether an evaluator with an interval is due after a step."""
        last = step == self.job.steps
        return any(evaluator.is_due(step, last) for evaluator, _ in self.evaluators)

    def evaluate(self, step: int, state: TrainState) -> list[Record]:
        """Lines of metrics.jsonl by the evaluators with an interval; their tables are kept."""
        params, last = self.learner.evaluated(state), step == self.job.steps
        found = []
        for evaluator, evaluate in self.evaluators:
            if evaluator.is_due(step, last):
                found += evaluate(step, params)
        records, tables = records_and_tables(found, step)
        if tables:
            self.results = self.results.with_tables(tables, step)
        return records

    def choose(self, step: int, records: list[Record]) -> bool:
        """Returns whether an evaluation is the best so far, and writes new tables.

        Those of the last step are written by `finish` alone, with the others of the end: a run that
        has results of its last step is finished.
        """
        is_best = self.selection.update(step, records)
        if is_first() and self.results.step == step and not self.is_over(step):
            self.folder.write_json(RESULTS, self.results.to_json())
        return is_best

    def finish(self, params: dict, step: int, first: int, done: int) -> None:
        """Runs the evaluators of the end, and writes results.json and the report.

        Where no step was left when this process began, no evaluator has run in it; where the best
        parameters are not the last, they ran on others last. Then all run, and lines that
        metrics.jsonl has already are not written again.

        Args:
          params: that the run ends with.
          step: updates that they have seen.
          first: updates of the run before this process, and
          done: after it.
        """
        found = []
        for evaluator, evaluate in self.evaluators:
            if evaluator.every is None or first == done or step < done:
                with self.log.phase(f"evaluating: {evaluator.name}"):
                    found += evaluate(step, params)
        if not is_first():
            return
        records, tables = records_and_tables(found, step)
        written = {(line["step"], line["split"]) for line in self.folder.metrics()}
        if new := [line for line in records if (step, line["split"]) not in written]:
            with self.open_metrics() as metrics:
                for line in new:
                    metrics.write(line)
        self.results = dataclasses.replace(
            self.results.with_tables((*self.selection.tables(), *tables), done),
            parameters=self.parameters,
            seconds=None if first else round(self.watch.seconds(), 1),
        )
        self.folder.write_json(RESULTS, self.results.to_json())
        write_report(self.folder)
        print_results(self.log, self.results, self.folder.location)


def records_and_tables(
    found: Sequence[Record | Table], step: int
) -> tuple[list[Record], tuple[Table, ...]]:
    """Lines of metrics.jsonl, with their step, and tables among the results of evaluators.

    All numbers of one split are in one line, whichever evaluators give them.
    """
    tables = tuple(one for one in found if isinstance(one, Table))
    lines: dict[str, Record] = {}
    for one in found:
        if not isinstance(one, Table):
            lines.setdefault(one["split"], {"step": step}).update(one)
    return list(lines.values()), tables
