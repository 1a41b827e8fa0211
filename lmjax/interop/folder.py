"""The model in a folder, whether a run of ours wrote it or transformers did.

The model that parameters are read for may be another than the folder's. A head that it has and the
folder's model lacks (of words, of rows, one of `heads` by its name) is drawn afresh, but for a
pooler that the folder has; one that it lacks is left. Adapters in the folder go on where it has the
same ones; otherwise they are merged into the weights, and its own are drawn afresh. Weights that it
keeps in few bits (`LoRA.base`, `quantization` of a public folder) are made of float ones, unless
the folder has them just so: then they are never floats. Where it has experts and the folder's model
has none, each begins as a copy of its feed-forward layer (see `lmjax.models.upcycling`). Where it
has more tokens, each new one begins as the mean of the old ones (Hewitt 2021, "Initializing new
word embeddings for pretrained language models").
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PRNGKeyArray

from lmjax.config import UserError, preset, replace
from lmjax.data.tokenizers import Tokenizer
from lmjax.data.tokenizers.folder_settings import folder_settings, token_name
from lmjax.interop import adapter_folder, huggingface
from lmjax.interop.beginning import beginning_folder, check_beginning
from lmjax.interop.packed_files import open_tensors
from lmjax.interop.settings import read_settings
from lmjax.interop.tensor_names import Shapes, titles_of
from lmjax.models import (
    LoRA,
    Quantization,
    TransformerConfig,
    abstract,
    draw_parameters,
    merge_adapters,
    with_base,
)
from lmjax.models.transformer import VOCABULARY_MULTIPLE
from lmjax.models.upcycling import dense_model, upcycled
from lmjax.models.weight_codes import WeightCode
from lmjax.parallel import Layout
from lmjax.remote import local_copy
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import TrainedModel, read_experiment, restore_trained_model


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

    Heads, adapters, bits of weights, experts and the number of tokens may differ: see above.

    Args:
      path: a run folder, whose best checkpoint (checkpoint.best) is taken, or else the newest
        undamaged one; or a folder that transformers reads, or one of adapters whose model is
        another folder here.
      config: the model that they are for. It may differ in what changes no shape, such as windows
        or the scaling of rotary positions.
      layout: how they are cut over the mesh that is set.
      seed: what a fresh head and fresh adapters are drawn from.

    Returns:
      A nested dictionary of float32 arrays, and integers where `config` keeps weights so.

    Raises:
      UserError: see `huggingface.read` and `load_trained_model`; or a parameter has another shape.
    """
    folder = local_copy(path, "folder")
    theirs = whole = model_folder(str(folder))
    if is_upcycled(theirs, config):
        params = read_params(path, dense_model(config), layout, seed)
        return upcycled(params, config, layout, jax.random.key(seed))
    if (few := _public_quantization(folder, config)) is not None:
        theirs = replace(theirs, quantization=few)
    goes_on = same_adapters(theirs.lora, config.lora)
    base = None if config.lora is None else config.lora.base
    keep = None  # how a public model's weights are kept as they are read
    if base is not None and not (goes_on and theirs.lora.base == base):
        plain = replace(config, lora=replace(config.lora, base=None))
        if theirs.lora is not None or not huggingface.is_model_folder(folder):
            return with_base(read_params(path, plain, layout, seed), plain, base)[0]
        config, keep = plain, base
    kept_adapters = theirs.lora is not None and goes_on
    theirs = replace(theirs, lora=replace(theirs.lora, base=base) if kept_adapters else None)
    old = min(theirs.vocab_size, config.vocab_size)
    ours = replace(config, vocab_size=old) if old < config.vocab_size else config
    wanted = huggingface.by_path(abstract(ours, layout)[1])
    fresh = _fresh(theirs, ours, wanted)
    _check_shapes(folder, theirs, ours, layout, fresh)
    params = _read_as_they_are(folder, layout, keep, few)
    if not goes_on:
        params, _ = merge_adapters(params, whole)
    elif whole.lora is not None:
        params, _ = with_base(params, whole, base)
    found = huggingface.by_path(params)
    if huggingface.is_model_folder(folder):
        found |= _public_poolers(folder, fresh, ours, wanted)
    else:
        found |= _own_poolers(found, fresh)
    kept = {name: found[name] for name in found if wanted.keys() & {name, name.rpartition(".")[0]}}
    if missing := fresh - kept.keys():
        kept |= _drawn(missing, ours, layout, seed)
    if ours != config:
        kept = _with_tokens(kept, ours, config, layout)
    return huggingface.nest(kept)


def _public_quantization(folder: Path, config: TransformerConfig) -> Quantization | None:
    """The codes in which a public folder's weights are kept as they are read; None: in none."""
    few = config.quantization
    if few is None or few.activations is not None or not huggingface.is_model_folder(folder):
        return None
    return few


def load_trained_model(
    folder: str | os.PathLike, layout: Layout, step: int | None = None
) -> TrainedModel:
    """The model of a run, on the mesh that is set.

    Where the run keeps an average of the parameters, the average is taken; where it keeps the best
    checkpoint (checkpoint.best), that one is. Where its checkpoints hold what was trained alone,
    the rest is read from the folder that it began with.

    Args:
      folder: what a training run wrote: config.json, checkpoints/, tokenizer/. It may go on.
      layout: how the model is cut over the mesh.
      step: which checkpoint; None is the best one, or else the newest undamaged one.

    Raises:
      UserError: not a run folder, no checkpoint, a damaged one, or a tokenizer that does not fit;
        or the folder that the run began with is not as it was.
    """

    def read_base(job: Any, fingerprint: str) -> dict:
        path = beginning_folder(job, folder)
        check_beginning(path, fingerprint, folder)
        return read_params(path, job.model, layout, job.seed)

    return restore_trained_model(folder, layout, step, read_base)


def _read_as_they_are(
    folder: Path,
    layout: Layout,
    keep: WeightCode | None = None,
    few: Quantization | None = None,
) -> dict:
    """The parameters of a folder of any kind, with its adapters.

    `keep` and `few` say how weights are kept that are read from a folder of transformers'.
    """
    if adapter_folder.is_adapter_folder(folder):
        return adapter_folder.read_adapted(folder, layout)[2]
    if huggingface.is_model_folder(folder):
        family, config = huggingface.read_config(folder)
        config = replace(config, quantization=few)
        return huggingface.read_params(folder, family, config, layout, keep=keep)[1]
    return load_trained_model(folder, layout).params


def is_upcycled(theirs: TransformerConfig, ours: TransformerConfig) -> bool:
    """Returns whether our experts begin as copies of their dense feed-forward layers."""
    return ours.feed_forward.reads_rows and not theirs.feed_forward.reads_rows


def same_adapters(theirs: LoRA | None, ours: LoRA | None) -> bool:
    """Returns whether adapters of one config mean the same in the other.

    Their dropout, and how the weights beside them are kept, make no difference.
    """
    if theirs is None or ours is None:
        return theirs is ours
    return replace(theirs, dropout=0.0, base=None) == replace(ours, dropout=0.0, base=None)


def tokenizer_folder(path: str | os.PathLike) -> Path:
    """Path of the tokenizer of a run folder, or of a folder that transformers or PEFT reads."""
    folder = local_copy(path, "folder")
    if adapter_folder.is_adapter_folder(folder):
        return adapter_folder.text_folder(folder)
    return folder if huggingface.is_model_folder(folder) else RunFolder(folder).tokenizer


def begin_token(path: str | os.PathLike, tokenizer: Tokenizer) -> int | None:
    """The token that a folder's settings name as the beginning of a text; None: they name none.

    It begins a text with nothing before it also where the model's program puts none before others.
    """
    name = token_name(folder_settings(tokenizer_folder(path)).get("bos_token"))
    return tokenizer.special.get(name)


def _fresh(theirs: TransformerConfig, ours: TransformerConfig, wanted: Shapes) -> set[str]:
    """The parameters of heads and adapters that one model has and the other lacks altogether."""
    lacking, adapters = _lacking(theirs, ours), "adapter" if theirs.lora is None else None
    return {name for name in wanted if name.startswith(lacking) or adapters in name.split(".")}


def _lacking(one: TransformerConfig, other: TransformerConfig) -> tuple[str, ...]:
    """Prefixes of the parameters of heads that `one` lacks and `other` may have."""
    names = {head.name for head in one.heads}
    return (
        *(() if one.word_head else ("head.", "head_bias", "head_transform.")),
        *(() if one.classifier is not None else ("classifier.",)),
        *(f"heads.{head.name}." for head in other.heads if head.name not in names),
    )


def _public_poolers(
    folder: Path, fresh: set[str], config: TransformerConfig, wanted: Shapes
) -> dict[str, jax.Array]:
    """Poolers of fresh heads that a folder of transformers has, as BERT's whatever its heads."""
    family, _ = huggingface.read_config(folder)
    files, params = open_tensors(folder, read_settings(folder)), {}
    for head in config.heads:
        lines = [
            line for kind in family.heads if kind.fits(head) for line in kind.tensors(head.name)
        ]
        for line in lines:
            titles = titles_of(family, line.theirs)
            title = next((title for title in titles if title in files.names), None)
            if title and line.ours[0] in fresh and ".pooler." in line.ours[0]:
                huggingface.put(params, wanted, line, (), files.read(title))
    return params


def _own_poolers(params: dict[str, jax.Array], fresh: set[str]) -> dict[str, jax.Array]:
    """The pooler of a classifier of rows, for each fresh head that has one."""
    poolers = [name for name in fresh if ".pooler." in name]
    found = {name: f"classifier.pooler.{name.rpartition('.')[2]}" for name in poolers}
    return {name: jnp.copy(params[own]) for name, own in found.items() if own in params}


def _drawn(
    names: set[str], config: TransformerConfig, layout: Layout, seed: int
) -> dict[str, jax.Array]:
    """Those parameters of a fresh model by dotted path; nothing else of it is made."""
    return _draw(frozenset(names), config, layout, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    names: frozenset[str], config: TransformerConfig, layout: Layout, key: PRNGKeyArray
) -> dict[str, jax.Array]:
    drawn = huggingface.by_path(draw_parameters(config, layout, key))
    return {name: drawn[name] for name in names}


def _with_tokens(
    params: dict[str, jax.Array],
    before: TransformerConfig,
    config: TransformerConfig,
    layout: Layout,
) -> dict[str, jax.Array]:
    """Parameters for more tokens than there were before, which begin as the mean of those."""
    wanted = huggingface.by_path(abstract(config, layout)[1])
    # Which axis is the vocabulary's, as seen by a change of its size.
    larger = replace(before, vocab_size=before.vocab_size + VOCABULARY_MULTIPLE)
    sizes, other = _shapes(before, layout), _shapes(larger, layout)

    def grow(name: str, array: jax.Array) -> jax.Array:
        axis = next(n for n, size in enumerate(sizes[name]) if size != other[name][n])
        old = jax.lax.slice_in_dim(array, 0, before.vocab_size, axis=axis)
        count = wanted[name].shape[axis] - before.vocab_size
        mean = jnp.mean(old, axis=axis, keepdims=True)
        return jnp.concatenate([old, jnp.repeat(mean, count, axis=axis)], axis=axis)

    @jax.jit
    def grown(params: dict) -> dict:
        whole = {name: jax.reshard(a, PartitionSpec()) for name, a in params.items()}
        return {
            name: jax.reshard(grow(name, array), wanted[name].sharding.spec)
            for name, array in whole.items()
        }

    return params | grown({name: params[name] for name in sizes if sizes[name] != other[name]})


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
    found = {k: shape for k, shape in found.items() if not k.startswith(_lacking(ours, theirs))}
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
