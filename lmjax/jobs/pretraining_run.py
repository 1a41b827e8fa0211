"""The story of a pretraining run, from the first document to the report."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import UserError, to_json
from lmjax.data import PreparedData, prepare
from lmjax.evaluation.held_out import HeldOut, Score
from lmjax.generation import Generator
from lmjax.jobs.pretrain import Parts, Pretrain
from lmjax.jobs.report import write_report
from lmjax.jobs.results import COLUMNS, WORDS, compare
from lmjax.jobs.run_folder import ROUNDING, RunFolder, differences, is_below
from lmjax.jobs.terminal import Stopwatch, Story, make_console
from lmjax.models.batch import Batch
from lmjax.training.checkpoints import Checkpointer
from lmjax.training.environment import compare_environment, describe_environment
from lmjax.training.loop import Loop, Speed
from lmjax.training.placement import to_devices
from lmjax.training.state import TrainState, make_state
from lmjax.training.step import make_evaluation_step


class PretrainingRun:
    """One process's part in a run: begins it, or goes on with it, and brings it to its end."""

    def __init__(self, experiment: Pretrain, parts: Parts, folder: RunFolder) -> None:
        """A mesh must be set, the one that the parts were made for."""
        self.experiment, self.parts, self.folder = experiment, parts, folder
        self.story = Story(make_console())
        self.watch = Stopwatch()

    def run(self) -> None:
        """See `Pretrain.run`."""
        settings = self.experiment.checkpoint
        with Checkpointer(
            self.folder.checkpoints, settings.keep, settings.keep_every, warn=self.story.warn
        ) as checkpointer:
            self.tell_beginning()
            if self.is_finished(checkpointer):
                self.tell_results(self.folder.results())
                return
            prepared = self.prepare_data()
            held_out = self.held_out_sets(prepared)
            state, done = self.begin_or_go_on(checkpointer, prepared)
            if done < self.experiment.steps:
                state, done = self.train(state, done, checkpointer, prepared, held_out)
        if done < self.experiment.steps:
            self.tell_interruption(done)
        self.finish(state, prepared, held_out)

    # ---- before the first step -----------------------------------------------------------------

    def prepare_data(self) -> PreparedData:
        """Tokenizer and token stores, made or found."""
        watch = Stopwatch()
        with self.story.phase("reading the text") as report:
            prepared = prepare(self.experiment.data, self.folder.path, report)
        size, wanted = prepared.tokenizer.vocab_size, self.experiment.model.vocab_size
        if size > wanted:
            raise UserError(
                f"the tokenizer has {size} tokens, the model only model.vocab_size={wanted}; "
                f"set model.vocab_size={size}"
            )
        for name, store in (prepared.train | prepared.held_out).items():
            if store.manifest.skipped:
                self.story.warn(
                    f"{name}: {store.manifest.skipped:,} pieces of input were left out, the first "
                    f"of them: {store.manifest.skipped_first[0]}"
                )
        sizes = (
            f"{name} {store.manifest.tokens / 1e6:,.2f} M tokens"
            for name, store in prepared.train.items()
        )
        self.story.fact("text", ", ".join(sizes), watch.seconds())
        return prepared

    def held_out_sets(self, prepared: PreparedData) -> HeldOut:
        """What the model is evaluated on."""
        return HeldOut(
            stores=prepared.held_out,
            objective=self.experiment.objective,
            layout=self.parts.layout,
            length=self.experiment.data.length,
            batch_size=self.experiment.data.batch_size // self.experiment.accumulation,
            tokens=self.experiment.evaluation.tokens,
        )

    def begin_or_go_on(
        self, checkpointer: Checkpointer, prepared: PreparedData
    ) -> tuple[TrainState, int]:
        """The state to train from and the steps it has behind it."""
        restored = checkpointer.restore(None, self.parts.state)
        environment = describe_environment()
        if restored is None:
            experiment = self.experiment
            averaged = experiment.average is not None
            state = make_state(
                experiment.model,
                self.parts.layout,
                self.parts.transform,
                experiment.seed,
                averaged,
            )
            done = 0
        else:
            state, extra = restored
            done = extra["step"]
            self.check_tokenizer(extra, prepared)
            self.check_schedule(extra, done)
            self.tell_continuation(extra, done)
        if jax.process_index() == 0:
            self.folder.write_json("environment.json", environment)
        return state, done
