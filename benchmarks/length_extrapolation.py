"""Trains on short rows and reads long ones: what the scalings of rotary positions are good for.

python -m benchmarks.length_extrapolation [folder=DIRECTORY] [json=FILE]

A small LLaMA is trained on Python's own text (a few minutes on 2 CPU cores; in `folder`, if given,
it is kept and found again). Then the same last tokens of long held-out documents are predicted from
contexts of growing length, as the model was trained and with each way to stretch it. A number that
falls from left to right says that more context is of use; without stretching it rises.
"""

import dataclasses
import tempfile
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.harness import save, table
from experiments.quickstart import experiment as quickstart
from lmjax.config import UserError, config, replace
from lmjax.data import prepare
from lmjax.data.rows import EvaluationRows, Ring
from lmjax.interop.folder import load_trained_model
from lmjax.jobs.pretrain import Pretrain
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import (
    AttentionConfig,
    DynamicNTKScaling,
    GatedFeedForwardConfig,
    LinearScaling,
    NTKScaling,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
    YaRNScaling,
    abstract,
)
from lmjax.objectives import CausalLM, Example
from lmjax.parallel import Mesh, generation_layout
from lmjax.runs.folder import RunFolder
from lmjax.training.placement import to_devices

LAST = 64  # tokens of each document that are predicted


@config
class LengthExtrapolation:
    """One training, and every way to read more than it saw."""

    trained: int = 128  # tokens of a row in training
    contexts: tuple[int, ...] = (128, 256, 512, 1024)  # tokens up to the last that is predicted
    steps: int = 1500  # of training
    batch_size: int = 16  # rows of a step
    documents: int = 64  # held-out ones, of the longest context at least
    folder: str = ""  # run folder of the training; none: a temporary one
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for contexts that are no test."""
        if not self.contexts or min(self.contexts) < max(LAST, self.trained):
            raise UserError(
                f"contexts={self.contexts}: give lengths from trained={self.trained} up, and no"
                f" less than the {LAST} tokens that are predicted"
            )


def training(settings: LengthExtrapolation, folder: str) -> Pretrain:
    """The training run: the quickstart's data, a LLaMA that could hold the longest context."""
    model = TransformerConfig(
        vocab_size=2048,
        hidden=128,
        num_layers=4,
        max_length=max(settings.contexts),
        attention=AttentionConfig(
            num_heads=4, head_dim=32, bias=False, output_bias=False, positions=Rotary()
        ),
        feed_forward=GatedFeedForwardConfig(size=344),
        norm=RMSNormConfig(),
        positions=None,
        tied_head=False,
        unroll=4,
    )
    return replace(
        quickstart,
        output=folder,
        steps=settings.steps,
        model=model,
        data=replace(quickstart.data, length=settings.trained, batch_size=settings.batch_size),
        evaluation=replace(quickstart.evaluation, every=settings.steps, prompts=()),
        checkpoint=replace(quickstart.checkpoint, every=settings.steps),
    )


def variants(model: TransformerConfig, trained: int, context: int) -> dict[str, TransformerConfig]:
    """The model, stretched from `trained` to `context` tokens in each way."""

    def attention(**changes: Any) -> TransformerConfig:
        return replace(model, attention=replace(model.attention, **changes))

    factor = context / trained
    dynamic = Rotary(scaling=DynamicNTKScaling(length=trained))
    return {
        "as trained": model,
        "linear": attention(positions=Rotary(scaling=LinearScaling(factor=factor))),
        "NTK": attention(positions=Rotary(scaling=NTKScaling(factor=factor))),
        "dynamic NTK": attention(positions=dynamic),
        "dynamic NTK, LogN": attention(positions=dynamic, logn_length=trained),
        "YaRN": attention(positions=Rotary(scaling=YaRNScaling(factor=factor, length=trained))),
        f"window of {trained}": attention(windows=(trained,)),
    }


def long_documents(settings: LengthExtrapolation, experiment: Pretrain) -> np.ndarray:
    """Tokens inside of held-out documents of code, [documents, longest context + 1]."""
    store = prepare(experiment.data, RunFolder(experiment.output).tokenizer).held_out["code"]
    rows = EvaluationRows(Ring(store, max(settings.contexts) + 1))
    tokens, segments = rows.read(0, len(rows))
    tokens = tokens[(segments == segments[:, :1]).all(axis=1)]
    if len(tokens) < settings.documents:
        raise UserError(
            f"only {len(tokens)} held-out rows of {max(settings.contexts)} tokens lie in one"
            f" document: lower documents={settings.documents} or contexts"
        )
    return tokens[: settings.documents]


def loss(model: TransformerConfig, params: dict, tokens: np.ndarray) -> float:
    """Nats of each of the last tokens, from all that stands before it."""
    layout, objective = generation_layout(), CausalLM()
    seeds = np.zeros(len(tokens), np.uint64)
    example = objective.prepare(tokens, np.ones_like(tokens), seeds)
    weights = np.zeros_like(example.targets.weights)
    weights[:, -LAST:] = 1
    targets = dataclasses.replace(example.targets, weights=weights)
    example = to_devices(Example(example.inputs, targets), layout, model.vocab_size)
    graph, _ = abstract(model, layout)
    evaluate = jax.jit(lambda p, e: objective.loss(nnx.merge(graph, p), e, None))
    sums = evaluate(params, example)
    return float(sums.extra["cross_entropy"] / sums.weight)


def main() -> None:
    """Trains, measures and prints."""
    settings = from_command_line(LengthExtrapolation())
    with tempfile.TemporaryDirectory() as temporary:
        experiment = training(settings, settings.folder or temporary)
        experiment.run()
        with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
            trained = load_trained_model(experiment.output, generation_layout())
            tokens = long_documents(settings, experiment)
            found: dict[str, list[float]] = {}
            for context in settings.contexts:
                for name, model in variants(trained.config, settings.trained, context).items():
                    value = loss(model, trained.params, tokens[:, -context - 1 :])
                    found.setdefault(name, []).append(value)
    print(
        f"\nnats of each of the last {LAST} tokens of {settings.documents} documents, from contexts"
        f" of so many tokens; trained on {settings.trained}:\n"
    )
    print(table(["", *map(str, settings.contexts)], [[k, *v] for k, v in found.items()]))
    save(settings.json, "length_extrapolation", contexts=settings.contexts, nats=found)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
