"""What a pretraining run says about itself."""

import json
from typing import Any

import jax

from lmjax.config import fingerprint, from_json
from lmjax.console import Story
from lmjax.data import JsonPrompts, PreparedData
from lmjax.data.round_trip import LITTLE, percent
from lmjax.generation.sampling import Sampling
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.results import withheld
from lmjax.jobs.settings import ROUNDING
from lmjax.launch import own_modules
from lmjax.objectives import BlankInfilling, Mixed
from lmjax.runs.changes import differences, is_below
from lmjax.runs.environment import compare_environment
from lmjax.runs.folder import CHECKPOINTS, CONFIG, METRICS, REPORT, TOKENIZER, RunFolder


def tell_beginning(story: Story, experiment: Pretrain, place: str, size: int) -> None:
    """What is to be done, on what, and where; `size` is the number of parameters."""
    story.title(place.rpartition("/")[2], f"{place}  {fingerprint(experiment)}")
    devices = jax.devices()
    axes = jax.sharding.get_mesh().shape.items()
    cut = " as " + " x ".join(f"{axis}={size}" for axis, size in axes if size > 1)
    story.fact(
        "devices", f"{len(devices)} x {devices[0].device_kind}{cut if len(devices) > 1 else ''}"
    )
    model, data = experiment.model, experiment.data
    story.fact(
        "model", f"{model.num_layers} layers x {model.hidden}, {size / 1e6:,.2f} M parameters"
    )
    if experiment.average is not None:
        story.fact("average", f"of the parameters, decay {experiment.average}: it is evaluated")
    rows = data.plan(experiment.seed).row0(experiment.steps)
    low, high = min(data.sizes), max(data.sizes)
    story.fact(
        "training",
        f"{experiment.steps:,} steps of {high if low == high else f'{low} to {high}'} x "
        f"{data.length} tokens, {rows * data.length:,} in all",
    )
    warn_of_answers(story, experiment)


def warn_of_answers(story: Story, experiment: Pretrain) -> None:
    """Says which objectives take the tokens around answers for text.

    It may be meant, as in a mixture of objectives, so it is no error.
    """
    objective = experiment.objective
    parts = objective.objectives if isinstance(objective, Mixed) else (objective,)
    unaware = dict.fromkeys(
        type(part).__name__
        for part in parts
        if not (isinstance(part, BlankInfilling) and part.answers is not None)
    )
    for domain in experiment.data.train if unaware else ():
        for source in (domain.source, domain.evaluation):
            if isinstance(source, JsonPrompts):
                story.warn(
                    f"{domain.name}: {' and '.join(unaware)} take{'s' * (len(unaware) == 1)} the "
                    f"tokens around answers, {source.mask} and {source.closing}, for text. Answers "
                    f"alone are learnt with objective=BlankInfilling, answers={source.mask!r}, eop="
                    f"{source.closing!r}; with JsonLines as source, texts without such tokens"
                )


def warn_of_losses(story: Story, prepared: PreparedData, predicts_text: bool) -> None:
    """Says which texts the tokens do not hold, and what that means for the run.

    Args:
      story: where to say it.
      prepared: the data of the run.
      predicts_text: whether bits per byte are to be measured.
    """
    for name, store in (prepared.held_out | prepared.train).items():
        trip = store.manifest.round_trip
        if trip.unknown_share > LITTLE:
            story.warn(
                f"{name}: {percent(trip.unknown_share)} of the tokens are unknown "
                f"({trip.unknown_name}), and nothing is learnt of what they stand for. Take a "
                "tokenizer that was made for such text, with the settings that it was made with; "
                "data.tokenizer=TrainedBPE() makes one from the text"
            )
    for name, reason in withheld(prepared).items() if predicts_text else ():
        story.warn(f"{name}: bits per byte are withheld, as they are {reason}")


def tell_continuation(story: Story, experiment: Pretrain, extra: dict[str, Any], done: int) -> None:
    """From where a run goes on, and whether its bits will be those of an unbroken one.

    Args:
      story: where to say it.
      experiment: as it is now.
      extra: what the checkpoint holds beside its arrays.
      done: steps behind it.
    """
    story.fact("going on", f"after step {done:,}")
    before = from_json(json.dumps(extra["experiment"]))
    changed = compare_environment(extra["environment"]) + [
        f"{name}: {old} before, {new} now"
        for name, old, new in differences(before, experiment)
        if is_below(name, ROUNDING)
    ]
    if changed:
        story.warn("From here on the run is no longer bit for bit an unbroken one:")
        for line in changed:
            story.warn(f"  {line}")


def tell_interruption(story: Story, done: int, steps: int) -> None:
    """How to go on after Ctrl-C or SIGTERM."""
    story.console.print()
    story.fact("stopped", f"after step {done:,} of {steps:,}; its state is saved")
    story.fact("to go on", "give the same command again")


def tell_finished(story: Story, steps: int, place: str) -> None:
    """What can be done with a run that came to its end before."""
    story.fact("finished", f"all {steps:,} steps were done before")
    story.fact(
        "to go on",
        "raise steps=, where the schedule allows it; to start anew, choose another output= or "
        f"delete {place}",
    )


def tell_results(story: Story, results: dict[str, Any], place: str) -> None:
    """The scores, the samples, and where everything is."""
    if results.get("bits_per_byte"):
        rows, words = results["bits_per_byte"], "less is better"
        story.scores("Bits per byte", words, results["columns"], rows)
    if results.get("recovered_words"):
        rows, words = results["recovered_words"], "share found again exactly; more is better"
        story.scores("Hidden words", words, results["columns"], rows)
    for note in results.get("notes", ()):
        story.warn(note)
    if results["samples"]:
        story.samples(results["samples"], results["samples_words"])
    story.files(
        place,
        (
            (REPORT, "curves, settings and samples on one page"),
            (METRICS, "every number, a JSON object a line"),
            (f"{CHECKPOINTS}/  {TOKENIZER}/  {CONFIG}", "the model, and all that made it"),
            (text_command(place), "text from the model"),
        ),
    )


def text_command(place: str) -> str:
    """What to type for text from the run in a folder; names the modules of its own classes."""
    modules = own_modules(RunFolder(place).experiment())
    imports = f" imports={','.join(modules)}" if modules else ""
    return f'python -m lmjax.generation {place}{imports} prompt="..."'


def sampling_words(sampling: Sampling) -> str:
    """How samples were drawn, in words."""
    if sampling.temperature == 0:
        return "always the likeliest token"
    words = f"sampled at temperature {sampling.temperature:g}"
    if sampling.top_k is not None:
        words += f" from the {sampling.top_k} likeliest tokens"
    if sampling.top_p is not None:
        words += f" from the likeliest tokens that hold {sampling.top_p:g} of the probability"
    if sampling.min_p is not None:
        words += f" from those at least {sampling.min_p:g} times as likely as the likeliest"
    if sampling.repetition_penalty != 1:
        words += f", repetitions penalised by {sampling.repetition_penalty:g}"
    return words
