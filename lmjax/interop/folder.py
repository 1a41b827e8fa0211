"""The model in a folder, whether a run of ours wrote it or transformers did."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from lmjax.config import UserError, preset
from lmjax.config.disk import local_path
from lmjax.interop import huggingface
from lmjax.models import TransformerConfig, abstract
from lmjax.parallel import Layout
from lmjax.training.trained import read_experiment, read_trained


@preset
def model_folder(path: str) -> TransformerConfig:
    """The config of the model in a run folder, or in a folder that transformers reads."""
    folder = local_path(path, "folder")
    if huggingface.is_model_folder(folder):
        return huggingface.read_config(folder)[1]
    return read_experiment(folder).model


def read_params(path: str | os.PathLike, config: TransformerConfig, layout: Layout) -> dict:
    """The parameters in a folder, for a model whose parameters have the same shapes.

    Args:
      path: a run folder, of which the newest undamaged checkpoint is taken, or a folder that
        transformers reads.
      config: the model that they are for. It may differ in what changes no shape, such as windows
        or the scaling of rotary positions.
      layout: how they are cut over the mesh that is set.

    Returns:
      A nested dictionary of float32 arrays.

    Raises:
      UserError: see `huggingface.read` and `read_trained`; or a parameter has another shape.
    """
    folder = local_path(path, "folder")
    theirs = model_folder(str(folder))
    _check_shapes(folder, theirs, config, layout)
    if huggingface.is_model_folder(folder):
        return huggingface.read(folder, layout)[2]
    return read_trained(folder, layout).params


def tokenizer_folder(path: str | os.PathLike) -> Path:
    """Where the tokenizer of a run folder or of a folder that transformers reads should lie."""
    folder = local_path(path, "folder")
    return folder if huggingface.is_model_folder(folder) else folder / "tokenizer"


def _check_shapes(
    folder: Path, theirs: TransformerConfig, ours: TransformerConfig, layout: Layout
) -> None:
    """Raises UserError where the parameters of two configs differ in name or shape."""

    def shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(abstract(config, layout)[1])
        name = jax.tree_util.keystr
        return {name(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}

    found, wanted = shapes(theirs), shapes(ours)
    differing = [
        f"    {name}: {_shown(found, name)} there, {_shown(wanted, name)} in the model"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        few = differing[:8] + [f"    and {len(differing) - 8} more"] * (len(differing) > 8)
        raise UserError(
            f"the parameters in {folder} do not fit the model:\n"
            + "\n".join(few)
            + f"\nmodel=model_folder:{folder} takes the model from there"
        )


def _shown(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"
