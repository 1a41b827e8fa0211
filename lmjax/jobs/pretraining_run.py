"""The story of a pretraining run, from the first document to the report."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import UserError, fingerprint, to_json
from lmjax.console import Stopwatch, Story, make_console
from lmjax.data import PreparedData, prepare
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.evaluation.held_out import HeldOut
from lmjax.generation.fill import MaskGuessing, Writing, filling_of
from lmjax.generation.generator import Generator
from lmjax.generation.text import TextGenerator, prompt_tokens
from lmjax.interop.folder import model_folder, read_params, tokenizer_folder
from lmjax.interop.huggingface import essence
from lmjax.interop.kept_files import keep
from lmjax.jobs.pretrain import Parts, Pretrain
from lmjax.jobs.report import write_report
from lmjax.jobs.results import (
    COLUMNS,
    RECOVERED_COLUMNS,
    RECOVERED_WORDS,
    compare,
    comparison_words,
    notes,
    recover,
    withheld,
)
from lmjax.jobs.telling import (
    sampling_words,
    tell_beginning,
    tell_continuation,
    tell_finished,
    tell_interruption,
    tell_results,
    warn_of_losses,
)
from lmjax.jobs.vocabulary import check_vocabulary
from lmjax.launch import is_first
from lmjax.models.batch import Batch
from lmjax.objectives import Lexicon
from lmjax.remote import local_copy
from lmjax.runs.changes import differences
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.environment import describe_environment
from lmjax.runs.folder import ENVIRONMENT, RESULTS, RunFolder
from lmjax.runs.metrics import MetricsWriter
from lmjax.scaling.hardware import find_peak, peak_memory_in_use
from lmjax.training.interruption import Interruption
from lmjax.training.loop import Loop, Yardstick
from lmjax.training.placement import to_devices
from lmjax.training.profiler import Profiler
from lmjax.training.state import TrainState, make_state
from lmjax.training.step import make_evaluation_step

HELD_OUT = "held_out/"  # before the name of a set, as the split of its metrics


class PretrainingRun:
    """One process's part in a run: begins it, or goes on with it, and brings it to its end."""

    def __init__(
        self,
        experiment: Pretrain,
        parts: Parts,
        folder: RunFolder,
        size: int,
        flops_per_token: float,
    ) -> None:
        """A mesh must be set, the one that the parts were made for.

        Args:
          experiment: the settings.
          parts: what `experiment.assemble` gives.
          folder: of the run, which must be this process's alone.
          size: number of the model's parameters.
          flops_per_token: model FLOPs of one token in training.
        """
        self.experiment, self.parts, self.folder = experiment, parts, folder
        self.size, self.flops_per_token = size, flops_per_token
        self.story = Story(make_console())
        self.watch = Stopwatch()
        self.filling = filling_of(experiment.objective)  # None: the model continues texts
        self.evaluation_step = make_evaluation_step(parts.graph, experiment.objective)

    def run(self) -> None:
        """See `Pretrain.run`."""
        settings = self.experiment.checkpoint
        with Checkpointer(
            self.folder.checkpoints, settings.keep, settings.keep_every, warn=self.story.warn
        ) as checkpointer:
            tell_beginning(self.story, self.experiment, self.folder.place, self.size)
            if self.is_finished(checkpointer):
                tell_results(self.story, self.folder.results(), self.folder.place)
                return
            checkpointer.check_place()
            self.experiment.check_batches(checkpointer.latest() or 0)
            prepared = self.prepare_data(checkpointer.latest_extra())
            held_out = self.held_out_sets(prepared)
            state, first = self.begin_or_go_on(checkpointer, prepared)
            done = first
            if done < self.experiment.steps:
                state, done, interruption = self.train(
                    state, done, checkpointer, prepared, held_out
                )
        if done < self.experiment.steps:
            tell_interruption(self.story, done, self.experiment.steps)
            sys.exit(interruption.exit_code)
        self.finish(state, prepared, whole=first == 0)

    # ---- before the first step -----------------------------------------------------------------

    def prepare_data(self, extra: dict[str, Any]) -> PreparedData:
        """Tokenizer and token stores, made or found; `extra` is the newest checkpoint's."""
        watch = Stopwatch()
        before = extra.get("text")
        if extra and before is None:
            self.story.warn(
                f"the checkpoint of step {extra['step']:,} does not say what text it was trained "
                "on, so whether it is the same is not known"
            )
        with self.story.phase("reading the text") as report:
            prepared = prepare(self.experiment.data, self.folder.tokenizer, report, before)
        for words in prepared.warnings:
            self.story.warn(words)
        check_vocabulary(prepared, self.experiment.model.vocab_size, self.story.warn)
        self.check_prompts(prepared)
        self.check_tokens(prepared)
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
        warn_of_losses(self.story, prepared, self.experiment.objective.predicts_text)
        return prepared

    def check_prompts(self, prepared: PreparedData) -> None:
        """Raises UserError for a prompt that cannot be completed: now, not after days."""
        room = self.experiment.model.max_length
        filling = self.filling
        for prompt in self.experiment.evaluation.prompts:
            if filling is None:
                length = len(prompt_tokens(prepared.tokenizer, prompt))
            else:
                blanked = filling.read(prepared.tokenizer, prompt)
                length = len(blanked.tokens)
                if isinstance(filling, Writing):
                    filling.share(blanked, room)
            if room is not None and length >= room:
                raise UserError(
                    f"evaluation.prompts: {prompt[:40]!r}... has {length:,} tokens and leaves no "
                    f"room in model.max_length={room:,}"
                )

    def check_tokens(self, prepared: PreparedData) -> None:
        """Raises UserError for a tokenizer without a special token that the objective needs."""
        objective, length = self.experiment.objective, self.experiment.data.length
        padding = np.zeros((1, objective.row_length(length)), np.int32)
        prepare = objective.preparation(Lexicon.of(prepared.tokenizer), length)
        prepare(padding, padding, np.zeros(1, np.uint64))

    def held_out_sets(self, prepared: PreparedData) -> HeldOut:
        """What the model is evaluated on."""
        return HeldOut(
            stores=prepared.held_out,
            objective=self.experiment.objective,
            layout=self.parts.layout,
            length=self.experiment.data.length,
            vocab_size=self.experiment.model.vocab_size,
            batch_size=self.experiment.part_rows,
            tokens=self.experiment.evaluation.tokens,
            lexicon=Lexicon.of(prepared.tokenizer),
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
                self.given_parameters(prepared),
            )
            done = 0
        else:
            state, extra = restored
            done = extra["step"]
            self.check_tokenizer(extra, prepared)
            self.check_schedule(extra, done)
            tell_continuation(self.story, self.experiment, extra, done)
        if is_first():
            self.folder.write_config(self.experiment)
            self.folder.write_json(ENVIRONMENT, environment)
        return state, done

    def given_parameters(self, prepared: PreparedData) -> dict | None:
        """What training begins with where the experiment names a folder; says what is not alike."""
        folder = self.experiment.begin_with
        if folder is None:
            return None
        watch = Stopwatch()
        model, seed = self.experiment.model, self.experiment.seed
        params = read_params(folder, model, self.parts.layout, seed)
        self.story.fact("begins with", f"the parameters in {folder}", watch.seconds())
        theirs, ours = map(essence, (model_folder(folder), self.experiment.model))
        for name, there, here in differences(theirs, ours):
            self.story.warn(f"model.{name} is {here} here; in {folder} it is {there}")
        where = tokenizer_folder(folder)
        try:
            alike = read_tokenizer(where).fingerprint == prepared.tokenizer.fingerprint
        except UserError as error:
            self.story.warn(f"whether it knows the same tokens is not known: {error}")
        else:
            if not alike:
                self.story.warn(
                    f"the tokenizer is not that of {folder}, so its tokens may mean something "
                    f'else; data.tokenizer=TokenizerFolder(path="{where}") takes it from there'
                )
            elif is_first():
                keep(local_copy(folder, "begin_with"), self.folder.path)  # how it is talked to
        return params

    def check_tokenizer(self, extra: dict[str, Any], prepared: PreparedData) -> None:
        """Raises UserError where the checkpoint's tokens mean something else."""
        saved, now = extra["tokenizer"], prepared.tokenizer.fingerprint
        if saved != now:
            raise UserError(
                f"the checkpoint in {self.folder.checkpoints} was trained on the tokens of another "
                f"tokenizer: its fingerprint is {saved}, this one has {now}"
            )

    def check_schedule(self, extra: dict[str, Any], done: int) -> None:
        """Raises UserError where the steps done had other rates than this experiment gives them."""
        before, now = extra["steps"], self.experiment.steps
        steps = jnp.arange(done)
        old, new = (np.asarray(self.experiment.rate(n)(steps)) for n in (before, now))
        # A schedule that does not look at the number of steps gives the very same numbers.
        if not np.array_equal(old, new):
            first = int(np.argmax(old != new))
            raise UserError(
                f"steps={now}: {done:,} steps were trained for a run of {before:,}, and "
                f"{type(self.experiment.schedule).__name__} gives a run of {now:,} other rates "
                f"from step {first + 1:,} on. Go on with steps={before}, or choose another output "
                "folder (schedule=Constant, InverseSquareRoot and the stable part of "
                "WarmupStableDecay can be extended)."
            )

    # ---- training ------------------------------------------------------------------------------

    def is_finished(self, checkpointer: Checkpointer) -> bool:
        """Whether the run came to its end before; says so, and what can be done."""
        steps = self.experiment.steps
        finished = self.folder.results().get("step", 0) >= steps
        if not finished or (checkpointer.latest() or 0) < steps:
            return False
        tell_finished(self.story, steps, self.folder.place)
        return True

    def train(
        self,
        state: TrainState,
        done: int,
        checkpointer: Checkpointer,
        prepared: PreparedData,
        held_out: HeldOut,
    ) -> tuple[TrainState, int, Interruption]:
        """Runs the loop; see `Loop.run`."""
        experiment = self.experiment
        plan = experiment.data.plan(experiment.seed)
        objective = experiment.objective
        loader = prepared.loader(
            plan,
            objective.preparation(Lexicon.of(prepared.tokenizer), experiment.data.length),
            objective.row_length(experiment.data.length),
            objective.row_overlap(experiment.data.length),
            jax.process_index(),
            jax.process_count(),
        )
        extra = {
            "experiment": json.loads(to_json(experiment)),
            "environment": describe_environment(),
            "plan": json.loads(to_json(plan)),
            "steps": experiment.steps,
            "tokenizer": prepared.tokenizer.fingerprint,
            "text": prepared.fingerprints,
        }
        with (
            loader.iterate(done) as batches,
            self.open_metrics() as metrics,
            Profiler(self.folder.profile, *(experiment.log.profile or (0, 0))) as profiler,
        ):
            metrics.truncate_after(done)
            loop = Loop(
                step=jax.jit(self.parts.step, donate_argnums=0),
                batches=self.on_devices(batches),
                steps=experiment.steps,
                write=metrics.write,
                evaluate=lambda step, state: self.evaluate(step, state, held_out),
                evaluate_every=experiment.evaluation.every,
                save=lambda step, state: checkpointer.save(step, state, extra),
                save_every=experiment.checkpoint.every,
                yardstick=self.yardstick(),
                log_every=experiment.log.every,
                console=self.story.console,
                check_save=checkpointer.check,
                end_save=checkpointer.wait,
                call_step=profiler.call,
            )
            return loop.run(state, done)

    def yardstick(self) -> Yardstick:
        """FLOPs of the model and the peak of the devices."""
        peak = find_peak()
        self.story.fact("peak", peak.note)
        return Yardstick(self.flops_per_token, peak.flops, peak_memory_in_use)

    def open_metrics(self) -> MetricsWriter:
        """metrics.jsonl and its copies."""
        log = self.experiment.log
        wandb = None
        if log.wandb is not None:
            name = fingerprint(self.experiment)
            wandb = {"project": log.wandb, "name": self.folder.path.name, "id": name}
        return MetricsWriter(self.folder.path, log.tensorboard, wandb)

    def on_devices(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[Batch]:
        """The batches on the mesh."""
        for _, batch in batches:
            yield to_devices(batch, self.parts.layout, self.experiment.model.vocab_size)

    def evaluate(self, step: int, state: TrainState, held_out: HeldOut) -> list[dict[str, Any]]:
        """A record for each held-out set."""
        scores = held_out.score(self.evaluation_step, self.evaluated(state))
        return [
            {
                "step": step,
                "split": HELD_OUT + name,
                "loss": score.loss,
                **({} if score.bits_per_byte is None else {"bits_per_byte": score.bits_per_byte}),
                **({"withheld": score.withheld} if score.withheld else {}),
                "tokens": score.tokens,
            }
            for name, score in scores.items()
        ]

    def evaluated(self, state: TrainState) -> dict:
        """The parameters that count: the average where one is kept."""
        return state.params if self.experiment.average is None else state.average

    # ---- after the last step -------------------------------------------------------------------

    def finish(self, state: TrainState, prepared: PreparedData, whole: bool) -> None:
        """Baselines, samples and the report; `whole` says that the run began in this process."""
        samples, recovered = [], {}
        if self.experiment.evaluation.prompts or isinstance(self.filling, Writing):
            generator = Generator(self.experiment.model, self.evaluated(state))
            generator = TextGenerator(generator, prepared.tokenizer, self.filling)
            with self.story.phase("writing samples"):
                samples = self.samples(generator)
            with self.story.phase("finding hidden words"):
                recovered, sentences = recover(generator, prepared)
            samples += sentences
        if not is_first():
            return
        results = {"step": self.experiment.steps, "parameters": self.size}
        if self.experiment.objective.predicts_text:
            with self.story.phase("measuring the baselines"):
                rows = compare(prepared, self.last_scores("bits_per_byte"))
            words = comparison_words(self.experiment.evaluation.tokens)
            results |= {"columns": COLUMNS, "words": words, "bits_per_byte": rows}
            results["withheld"] = withheld(prepared)
        else:
            results["held_out_loss"] = self.last_scores("loss")
        if recovered:
            results["recovered_words"] = recovered
            results |= {"columns": RECOVERED_COLUMNS, "words": RECOVERED_WORDS}
        results["notes"] = notes(prepared)
        results["samples"] = samples
        results["samples_words"] = sampling_words(self.experiment.evaluation.sampling)
        if whole:
            results["seconds"] = round(self.watch.seconds(), 1)
        self.folder.write_json(RESULTS, results)
        write_report(self.folder)
        tell_results(self.story, results, self.folder.place)

    def samples(self, generator: TextGenerator) -> list[dict[str, str]]:
        """What the model makes of the prompts; filled blanks stand on a line of their own."""
        settings = self.experiment.evaluation
        if isinstance(generator.filling, MaskGuessing):
            texts = [guessed(generator, prompt) for prompt in settings.prompts]
        else:
            make = generator.generate if generator.filling is None else generator.fill
            texts = make(settings.prompts, settings.sampling, settings.sample_length)
            if generator.filling is not None:
                texts = [f"\n{filled.text}" for filled in texts]
        return [
            {"prompt": prompt, "text": text}
            for prompt, text in zip(settings.prompts, texts, strict=True)
        ]

    def last_scores(self, measure: str) -> dict[str, float]:
        """A measure by held-out set after the last step."""
        return {
            record["split"].removeprefix(HELD_OUT): record[measure]
            for record in self.folder.metrics()
            if record["step"] == self.experiment.steps
            and record["split"].startswith(HELD_OUT)
            and measure in record
        }


def guessed(generator: TextGenerator, prompt: str) -> str:
    """A line for each mask of the prompt: the likeliest tokens, with their probabilities."""
    lines = (
        ", ".join(f"{text} {probability:.3f}" for text, probability in mask)
        for mask in generator.guess(prompt)
    )
    return "".join(f"\n{line}" for line in lines)
