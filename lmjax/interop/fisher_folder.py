"""Folders with the Fisher information of a model: what a model must keep of what it learnt."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.config import UserError, config
from lmjax.interop import huggingface
from lmjax.interop.folder import read_params
from lmjax.launch import is_first
from lmjax.models import TransformerConfig, abstract
from lmjax.parallel import Layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder

ANCHOR, FISHER = "params", "fisher"  # entries of the checkpoint


@config
class FisherInformation:
    """A model and the diagonal of its Fisher information: the config.json of their folder."""

    model: TransformerConfig
    source: str  # run folder or public model folder that the parameters are of
    rows: int  # rows of text that gradients were taken of
    seed: int  # of the labels
    before: str | None = None  # folder whose Fisher information is part of the sum


def write_fisher(
    folder: str | os.PathLike, made: FisherInformation, params: dict, fisher: dict
) -> None:
    """Writes parameters and their Fisher information as the checkpoint of step 0 of a folder.

    Args:
      folder: is a run folder afterwards, which holds the model as it was.
      made: becomes config.json.
      params: of the model, sharded over the mesh that is set.
      fisher: a number for each of them.

    Raises:
      UserError: it cannot be written.
    """
    run = RunFolder(folder)
    with Checkpointer(run.checkpoints) as checkpointer:
        checkpointer.save(0, {ANCHOR: params, FISHER: fisher}, {})
    if is_first():
        run.write_config(made)


def read_fisher(
    folder: str | os.PathLike, config: TransformerConfig, layout: Layout
) -> tuple[dict, dict]:
    """The parameters in a folder of `write_fisher` and their Fisher information, for a model.

    Parameters that the folder's model lacks, such as those of a new head or of new tokens, are free
    to move: their Fisher information is 0.

    Args:
      folder: of `write_fisher`.
      config: the model that they are for; it may have more heads and more tokens.
      layout: how they are cut over the mesh that is set.

    Raises:
      UserError: no such folder, or a parameter has another shape.
    """
    run = RunFolder(folder)
    made = run.experiment()
    if not isinstance(made, FisherInformation):
        raise UserError(
            f"{folder} holds no Fisher information: python -m lmjax.jobs.fisher RUN_FOLDER {folder}"
            " writes some"
        )
    params = read_params(folder, config, layout)
    _, shapes = abstract(made.model, layout)
    restored = Checkpointer(run.checkpoints).restore(0, {FISHER: shapes})
    if restored is None:
        raise UserError(f"{folder} holds no checkpoint: it was not written to its end")
    wanted = huggingface.by_path(abstract(config, layout)[1])
    found = {k: a for k, a in huggingface.by_path(restored[0][FISHER]).items() if k in wanted}

    @jax.jit
    def fitted(found: dict) -> dict:
        fitted = {}
        for name, shape in wanted.items():
            # Whole for the moment, since the old size may not divide as the new one does.
            old = jax.reshard(found[name], PartitionSpec()) if name in found else None
            new = jnp.zeros(shape.shape, shape.dtype)
            if old is not None:
                new = jnp.pad(old, [(0, n - o) for n, o in zip(new.shape, old.shape, strict=True)])
            fitted[name] = jax.reshard(new, shape.sharding.spec)
        return fitted

    return params, huggingface.nest(fitted(found))
