"""The model in a folder, whether a run of ours wrote it or transformers did."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from lmjax.config import UserError, preset, replace
from lmjax.interop import adapter_folder, huggingface
from lmjax.models import LoRA, TransformerConfig, abstract, draw_parameters, merge_adapters
from lmjax.parallel import Layout
from lmjax.remote import local_copy
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import load_trained_model, read_experiment


@preset
def model_folder(path: str) -> TransformerConfig:
    """The config of the model in a run folder, or in one that transformers or PEFT reads."""
    folder = local_copy(path, "folder")
    if adapter_folder.is_adapter_folder(folder):
        return adapter_folder.read_adapted_config(folder)
    if huggingface.is_model_folder(folder):
        return huggingface.read_config(folder)[1]
    return read_experiment(folder).model


def read_params(
    path: str | os.PathLike, config: TransformerConfig, layout: Layout, seed: int = 0
) -> dict:
    """The parameters in a folder, for a model whose parameters have the same shapes.

    Where the folder's model has no head of words, or no classifier of texts, and `config` has one,
    it is drawn afresh. Adapters in the folder go on where `config` has the same ones; otherwise
    they are merged into the weights, and those of `config` are drawn afresh.

    Args:
      path: a run folder, of which the newest undamaged checkpoint is taken, or a folder that
        transformers reads, or one of adapters whose model is another folder here.
      config: the model that they are for. It may differ in what changes no shape, such as windows
        or the scaling of rotary positions.
      layout: how they are cut over the mesh that is set.
      seed: what a fresh head and fresh adapters are drawn from.

    Returns:
      A nested dictionary of float32 arrays.

    Raises:
      UserError: see `huggingface.read` and `load_trained_model`; or a parameter has another shape.
    """
    folder = local_copy(path, "folder")
    theirs = whole = model_folder(str(folder))
    merges = not same_adapters(theirs.lora, config.lora)
    if merges:
        theirs = replace(theirs, lora=None)
    fresh = _fresh(theirs, config, layout)
    _check_shapes(folder, theirs, config, layout, fresh)
    if adapter_folder.is_adapter_folder(folder):
        params = adapter_folder.read_adapted(folder, layout)[2]
    elif huggingface.is_model_folder(folder):
        params = huggingface.read(folder, layout)[2]
    else:
        params = load_trained_model(folder, layout).params
    if merges:
        params, _ = merge_adapters(params, whole)
    if not fresh:
        return params
    return huggingface.nest(huggingface.by_path(params) | _drawn(fresh, config, layout, seed))


def same_adapters(theirs: LoRA | None, ours: LoRA | None) -> bool:
    """Returns whether adapters of one config mean the same in the other, apart from dropout."""
    if theirs is None or ours is None:
        return theirs is ours
    return replace(theirs, dropout=0.0) == replace(ours, dropout=0.0)


def tokenizer_folder(path: str | os.PathLike) -> Path:
    """Path of the tokenizer of a run folder, or of a folder that transformers or PEFT reads."""
    folder = local_copy(path, "folder")
    if adapter_folder.is_adapter_folder(folder):
        return adapter_folder.text_folder(folder)
    return folder if huggingface.is_model_folder(folder) else RunFolder(folder).tokenizer


def _fresh(theirs: TransformerConfig, ours: TransformerConfig, layout: Layout) -> set[str]:
    """The parameters of heads and adapters that one model has and the other lacks altogether."""
    parts = (
        *(() if theirs.word_head else ("head.", "head_bias", "head_transform.")),
        *(() if theirs.classifier is not None else ("classifier.",)),
    )
    adapters = "adapter" if theirs.lora is None else None
    names = _shapes(ours, layout)
    return {name for name in names if name.startswith(parts) or adapters in name.split(".")}


def _drawn(
    names: set[str], config: TransformerConfig, layout: Layout, seed: int
) -> dict[str, jax.Array]:
    """Those parameters of a fresh model by dotted path; nothing else of it is made."""

    @jax.jit
    def draw(key):
        drawn = huggingface.by_path(draw_parameters(config, layout, key))
        return {name: drawn[name] for name in names}

    return draw(jax.random.key(seed))


def _shapes(config: TransformerConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by dotted path."""
    leaves = huggingface.by_path(abstract(config, layout)[1])
    return {name: leaf.shape for name, leaf in leaves.items()}


def _check_shapes(
    folder: Path,
    theirs: TransformerConfig,
    ours: TransformerConfig,
    layout: Layout,
    fresh: set[str],
) -> None:
    """Raises UserError where the parameters of two configs differ in name or shape."""
    found, wanted = _shapes(theirs, layout), _shapes(ours, layout)
    differing = [
        f"    {name}: {_shown(found, name)} there, {_shown(wanted, name)} in the model"
        for name in sorted((found.keys() | wanted.keys()) - fresh)
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
