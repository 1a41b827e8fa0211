"""Trained models: a model and its tokenizer, from a run folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.config import UserError
from lmjax.data.tokenizers import Tokenizer, load_tokenizer
from lmjax.models import TransformerConfig, abstract
from lmjax.objectives import Objective
from lmjax.parallel import Layout
from lmjax.runs.checkpoints import BASE, BEST, Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.training.trained_part import TrainedPart

NAMED = 5  # tokens that are told by name


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its parameters on the devices.

    Attributes:
      config: of the model.
      params: nested dictionary of float32 arrays.
      tokenizer: that it was trained with; None where a folder that was converted had none.
      objective: what it was trained to do; None where it was converted.
    """

    config: TransformerConfig
    params: dict
    tokenizer: Tokenizer | None
    objective: Objective | None = None

    @property
    def reads_prefix(self) -> bool:
        """Returns whether it learned to read a prompt from both sides; see `Objective`."""
        return self.objective is not None and self.objective.reads_prefix


def restore_trained_model(
    folder: str | os.PathLike,
    layout: Layout,
    step: int | None,
    read_base: Callable[[Any, str], dict],
) -> TrainedModel:
    """The model of a run, on the mesh that is set; see `lmjax.interop.folder.load_trained_model`.

    Args:
      folder: of the run.
      layout: how the model is cut over the mesh.
      step: which checkpoint; None is the best one, or else the newest undamaged one.
      read_base: (experiment, fingerprint) -> the parameters that the run began with, for a
        checkpoint that holds what was trained alone.

    Raises:
      UserError: not a run folder, no checkpoint, a damaged one, or a tokenizer that does not fit.
    """
    run = RunFolder(folder)
    experiment, where = read_experiment(run), run.tokenizer
    tokenizer = load_tokenizer(where) if where.is_dir() else None
    entry = "params" if getattr(experiment, "ema_decay", None) is None else "average"
    _, shapes = abstract(experiment.model, layout)
    if entry == "params" and getattr(experiment, "weights", None) == "bfloat16":
        shapes = jax.tree.map(_as_stored, shapes)
    checkpointer = Checkpointer(run.checkpoints)

    def trained_part() -> TrainedPart:
        return experiment.trained().part(experiment.model)

    def wanted(extra: dict[str, Any]) -> dict[str, Any]:
        return {entry: trained_part().shapes(shapes) if BASE in extra else shapes}

    restored = checkpointer.restore(best_step(checkpointer) if step is None else step, wanted)
    if restored is None:
        raise UserError(f"{folder} holds no checkpoint yet: nothing has been saved there")
    tree, extra = restored
    if tokenizer is None and "tokenizer" in extra:
        raise UserError(f"{folder} lacks the tokenizer of its checkpoint: there is no {where}")
    if tokenizer is not None:
        _check_tokenizer(tokenizer, where, extra)
    objective = getattr(experiment, "objective", None)
    params = jax.tree.map(_as_used, tree[entry])
    if BASE in extra:
        params = trained_part().whole(params, read_base(experiment, extra[BASE]))
    return TrainedModel(experiment.model, params, tokenizer, objective)


def _as_stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter as a run with `weights=bfloat16` saves it: matrices and vectors in 16 bits."""
    if leaf.dtype != jnp.float32 or not leaf.ndim:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)


def _as_used(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def best_step(checkpointer: Checkpointer) -> int | None:
    """The best checkpoint, where the newest one names one that is there; None: there is no best."""
    best = checkpointer.latest_extra().get(BEST)
    return best["step"] if best is not None and best["step"] in checkpointer.steps() else None


def _check_tokenizer(tokenizer: Tokenizer, where: Path, extra: dict[str, Any]) -> None:
    """Raises UserError for a tokenizer that is not the model's."""
    if extra.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"the tokenizer in {where} is not the one that the checkpoint was trained with:"
            f" its fingerprint is {tokenizer.fingerprint}, not {extra['tokenizer']}"
        )


def beyond_table(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """Message about a tokenizer with more tokens than the model has; None where all fit.

    Such tokens may be there for nothing, as padding often is: those in a text are what is wrong.
    """
    if tokenizer.vocab_size <= vocab_size:
        return None
    names = {token: name for name, token in tokenizer.special.items()}
    first = range(vocab_size, min(tokenizer.vocab_size, vocab_size + NAMED))
    shown = [
        f"{names.get(t) or tokenizer.token_bytes(t).decode(errors='replace')!r} ({t})"
        for t in first
    ]
    more = tokenizer.vocab_size - vocab_size - len(shown)
    return (
        f"the tokenizer has {tokenizer.vocab_size} tokens, more than the {vocab_size} of the model;"
        f" texts must not have {', '.join(shown)}{f' and {more} more' if more else ''}"
    )


def read_experiment(folder: RunFolder | Path) -> Any:
    """The experiment of a run folder: a config with a `model`. UserError where there is none."""
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    experiment = run.experiment()
    if not isinstance(getattr(experiment, "model", None), TransformerConfig):
        raise UserError(f"{run.config} is not the config of a run: it has no model")
    return experiment
