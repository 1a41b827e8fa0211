"""Lines that a training run prints about itself."""

import json
from typing import Any

import jax

from lmjax.config import fingerprint, from_json
from lmjax.console import RunLog
from lmjax.data import Data
from lmjax.data.chat.templated import template_of
from lmjax.jobs.best import Selection
from lmjax.jobs.results import Results
from lmjax.jobs.settings import ROUNDING
from lmjax.launch import user_modules
from lmjax.runs.changes import differences, is_below
from lmjax.runs.environment import compare_environment
from lmjax.runs.folder import CHECKPOINTS, CONFIG, METRICS, REPORT, TOKENIZER, RunFolder
from lmjax.scaling.flops import count_parameters, count_trained


def print_beginning(story: RunLog, job: Any, location: str, parameters: int) -> None:
    """Prints the run's name, devices, model and steps.

    Args:
      story: where to print.
      job: a `TrainingJob`.
      location: path or URL of the run folder.
      parameters: number of parameters of the model.
    """
    story.title(location.rpartition("/")[2], f"{location}  {fingerprint(job)}")
    devices = jax.devices()
    axes = jax.sharding.get_mesh().shape.items()
    cut = " as " + " x ".join(f"{axis}={size}" for axis, size in axes if size > 1)
    story.fact(
        "devices", f"{len(devices)} x {devices[0].device_kind}{cut if len(devices) > 1 else ''}"
    )
    layers, hidden = job.model.num_layers, job.model.hidden
    active = count_parameters(job.model).active
    used = "" if active == parameters else f", of which a token uses {active / 1e6:,.2f} M"
    story.fact("model", f"{layers} layers x {hidden}, {parameters / 1e6:,.2f} M parameters{used}")
    if job.ema_decay is not None:
        story.fact("average", f"of the parameters, decay {job.ema_decay}: it is evaluated")
    for label, words in job.facts():
        story.fact(label, words)
    if job.lengths_vary:
        story.fact(
            "row lengths",
            "those of a step's longest text, rounded up to one of a few; each is compiled once",
        )
    if (best := job.checkpoint.best) is not None:
        end = f", and the end after {best.patience} evaluations without a better one"
        story.fact("best", f"the checkpoint with the {best.words}{end if best.patience else ''}")


def print_trained(story: RunLog, job: Any, parameters: int) -> None:
    """Prints how many of the parameters are trained, where it is not all of them."""
    trained = count_trained(job.model, job.trained().share)
    if trained < parameters:
        story.fact(
            "trained",
            f"{trained:,} of {parameters:,} parameters, {trained / parameters:.2%}"
            f" ({type(job.trained()).__name__})",
        )


def print_continuation(story: RunLog, job: Any, extra: dict[str, Any], done: int) -> None:
    """From where a run goes on, and whether its bits will be those of an unbroken one.

    Args:
      story: where to say it.
      job: as it is now.
      extra: what the checkpoint holds beside its arrays.
      done: steps behind it.
    """
    story.fact("going on", f"after step {done:,}")
    before = from_json(json.dumps(extra["experiment"]))
    changed = compare_environment(extra["environment"]) + [
        f"{name}: {old} before, {new} now"
        for name, old, new in differences(before, job)
        if is_below(name, ROUNDING)
    ]
    if changed:
        story.warn("From here on the run is no longer bit for bit an unbroken one:")
        for line in changed:
            story.warn(f"  {line}")


def print_interruption(story: RunLog, done: int, steps: int) -> None:
    """Prints how to resume after Ctrl-C or SIGTERM."""
    story.console.print()
    story.fact("stopped", f"after step {done:,} of {steps:,}; its state is saved")
    story.fact("to go on", "give the same command again")


def print_finished(story: RunLog, steps: int, location: str, selection: Selection) -> None:
    """Prints what can be done with a finished run."""
    if selection.is_over:
        best = selection.best
        story.fact(
            "finished",
            f"training ended early, {best.since} evaluations after the best one, of step"
            f" {best.step:,}",
        )
        story.fact("to go on", "raise checkpoint.best.patience=")
        return
    story.fact("finished", f"all {steps:,} steps were done before")
    story.fact(
        "to go on",
        "raise steps=, where the schedule allows it; to start anew, choose another output= or "
        f"delete {location}",
    )


def print_results(story: RunLog, results: Results, location: str) -> None:
    """Prints the tables, and where everything is."""
    for table in results.tables:
        story.table(table)
    story.files(
        location,
        (
            (REPORT, "curves, settings and samples on one page"),
            (METRICS, "every number, a JSON object a line"),
            (f"{CHECKPOINTS}/  {TOKENIZER}/  {CONFIG}", "the model, and all that made it"),
            *(((command, "text from the model"),) if (command := text_command(location)) else ()),
        ),
    )


def text_command(location: str) -> str:
    """Command that generates text from a run; it names the modules of the user's own classes.

    Empty where the model has no head of words, or is an encoder that does not fill blanks.
    """
    experiment = RunFolder(location).experiment()
    fills = experiment.objective.infill_format() is not None
    if not experiment.model.word_head or not (fills or experiment.model.attention.causal):
        return ""
    modules, data = user_modules(experiment), getattr(experiment, "data", None)
    imports = f" imports={','.join(modules)}" if modules else ""
    chats = not fills and isinstance(data, Data) and template_of(data) is not None
    return f"python -m lmjax.generation {location}{imports} " + (
        "chat=true" if chats else 'prompt="..."'
    )
