"""A model from its folder: of a run of ours, or a public one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

from lmjax.config import UserError, replace
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.chat.templated import template_of
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.generation.fill import Infiller, infiller_by, infiller_of
from lmjax.generation.generator import Generator
from lmjax.generation.text import TextGenerator
from lmjax.generation.weights import layers_apart
from lmjax.interop import gguf_source, huggingface
from lmjax.interop.adapter_folder import base_folder, is_adapter_folder, read_adapted, text_folder
from lmjax.interop.folder import load_trained_model
from lmjax.interop.huggingface import Dtype
from lmjax.interop.kept_files import read_end_ids
from lmjax.launch import is_first
from lmjax.models import TransformerConfig, decoding_layout
from lmjax.models.empty_cache import CacheKind
from lmjax.models.transformer import NO_HEAD
from lmjax.parallel import Layout, generation_layout
from lmjax.remote import local_copy
from lmjax.runs.trained_model import beyond_table, read_experiment


def load(
    folder: str | os.PathLike,
    layout: Layout | None = None,
    dtype: Dtype | None = None,
    cache: CacheKind | None = None,
) -> TextGenerator:
    """The model of a run folder (`load_run`), a public folder (`load_model`) or a GGUF file.

    The folder may be a URL: what is there is copied to the cache folder first.
    """
    with gguf_source.as_folder(local_copy(folder, "folder")) as folder:
        if not (is_adapter_folder(folder) or huggingface.is_model_folder(folder)):
            return load_run(folder, layout, dtype=dtype, cache=cache)
        try:
            return load_model(folder, layout, dtype, cache)
        except UserError as error:
            reasons = str(error), huggingface.assumption(folder)
            raise UserError("\n".join(filter(None, reasons))) from None


def load_model(
    folder: str | os.PathLike,
    layout: Layout | None = None,
    dtype: Dtype | None = None,
    cache: CacheKind | None = None,
) -> TextGenerator:
    """The model of a folder that transformers reads, with its tokenizer, on the mesh that is set.

    Args:
      folder: config.json, safetensors, and a tokenizer (see `read_tokenizer`); or PEFT's adapters
        for such a model; or a folder of `gguf_source.as_folder`. Weights in few bits stay so where
        our settings have such a form.
      layout: how the model is cut over the mesh; None is `generation_layout()`.
      dtype: what is computed in; None: float32.
      cache: what keys and values are kept in; see `Generator`.

    Raises:
      UserError: see `interop.huggingface.read`; or a tokenizer that is missing or does not fit.
    """
    layout = generation_layout() if layout is None else layout
    folder = local_copy(folder, "folder")
    if reason := gguf_source.tokenizer_note(folder):
        raise UserError(f"{folder}: text needs a tokenizer, and it cannot be read: {reason}")
    tokenizer = read_tokenizer(text_folder(folder))
    adapters, base, apart = is_adapter_folder(folder), model_of(folder), layers_apart()
    family, config = huggingface.read_config(base)
    if not config.word_head:
        raise UserError(f"{folder}: {NO_HEAD}")
    if adapters:
        config, _, params = read_adapted(folder, layout)
    elif (packed := gguf_source.weights_of(folder)) is not None:
        config, _, params = gguf_source.read(packed, layout, apart=apart, few_bits=True)
    else:
        config, reason = huggingface.in_few_bits(folder, family, config)
        if reason:
            tell(f"{folder}: its weights in few bits are read as float32: {reason}")
        _, params = huggingface.read_params(folder, family, config, layout, apart=apart)
    if unused := beyond_table(tokenizer, config.vocab_size):
        tell(f"{folder}: {unused}")
    filling = infiller_by(family.infill)
    given = decoding_layout(config, layout) if apart and not adapters else layout
    generator = Generator(computed_in(config, dtype), params, given, cache=cache)
    return TextGenerator(generator, tokenizer, filling, ends_of(text_folder(folder), config))


def model_of(folder: Path) -> Path:
    """The folder with the weights: of adapters, that of their model."""
    return base_folder(folder) if is_adapter_folder(folder) else folder


def load_run(
    folder: str | os.PathLike,
    layout: Layout | None = None,
    step: int | None = None,
    dtype: Dtype | None = None,
    cache: CacheKind | None = None,
) -> TextGenerator:
    """The model of a training run, with its tokenizer, on the mesh that is set.

    Where the run keeps an average of the parameters, the average is taken; where it keeps the best
    checkpoint (checkpoint.best), that one is.

        with jax.set_mesh(Mesh().build()):
            print(load_run("runs/quickstart").generate(["The list"])[0])

    Args:
      folder: what a training run wrote: config.json, checkpoints/, tokenizer/. It may go on.
      layout: how the model is cut over the mesh; None is `generation_layout()`.
      step: which checkpoint; None is the best one, or else the newest undamaged one.
      dtype: what is computed in; None: what the run was trained in, but float32 on a CPU.
      cache: what keys and values are kept in; see `Generator`.

    Raises:
      UserError: not a run folder, no checkpoint, a damaged one, or a tokenizer that does not fit.
    """
    layout = generation_layout() if layout is None else layout
    folder = local_copy(folder, "folder")
    trained = load_trained_model(folder, layout, step)
    if trained.tokenizer is None:
        raise UserError(f"there is no tokenizer in {folder}: text needs one")
    if unused := beyond_table(trained.tokenizer, trained.config.vocab_size):
        tell(f"{folder}: {unused}")
    computed = computed_in(trained.config, dtype)
    generator = Generator(computed, trained.params, layout, cache=cache)
    filling = infiller_of(trained.objective, template_of_run(folder))
    ends = ends_of(folder, trained.config)
    return TextGenerator(generator, trained.tokenizer, filling, ends, reads_prefix(folder))


def filling_of(folder: str | os.PathLike) -> Infiller | None:
    """The filling of blanks that the model of a folder learned; None: it continues texts."""
    folder = local_copy(folder, "folder")
    if is_adapter_folder(folder) or huggingface.is_model_folder(folder):
        return infiller_by(huggingface.read_config(model_of(folder))[0].infill)
    objective = getattr(read_experiment(folder), "objective", None)
    return infiller_of(objective, template_of_run(folder))


def reads_prefix(folder: str | os.PathLike) -> bool:
    """Returns whether the model of a folder learned to see a text's beginning both ways."""
    folder = local_copy(folder, "folder")
    if is_adapter_folder(folder) or huggingface.is_model_folder(folder):
        return False
    objective = getattr(read_experiment(folder), "objective", None)
    return objective is not None and objective.reads_prefix


def template_of_run(folder: Path) -> ChatFormat | None:
    """The chat format of the conversations that a run was trained on; None: there were none."""
    data = getattr(read_experiment(folder), "data", None)
    return None if data is None else template_of(data)


def computed_in(config: TransformerConfig, dtype: Dtype | None) -> TransformerConfig:
    """The config with the precision to decode in; says where it is not the config's own."""
    wanted = precision(config, dtype)
    if dtype is None and wanted != config.dtype:
        tell("computing in float32, as bfloat16 is slower on a CPU; dtype=bfloat16 asks for it")
    return config if wanted == config.dtype else replace(config, dtype=wanted)


def precision(config: TransformerConfig, dtype: Dtype | None) -> str:
    """Name of the precision to decode in, where `dtype` is asked for; see `load_run`."""
    if dtype is not None:
        return dtype
    on_cpu = jax.default_backend() == "cpu"
    return "float32" if on_cpu and config.dtype == "bfloat16" else config.dtype


def ends_of(folder: Path, config: TransformerConfig) -> tuple[int, ...]:
    """The ids that end a text by the folder's files; says which of them the model does not have."""
    ids = read_end_ids(folder)
    if strange := [token for token in ids if not 0 <= token < config.vocab_size]:
        tell(
            f"{folder}: eos_token_id has {', '.join(map(str, strange))}, which the model does not"
            f" have: its ids are 0 to {config.vocab_size - 1}"
        )
    return tuple(token for token in ids if token not in strange)


def tell(note: str) -> None:
    """Writes what the user should know, once for all processes."""
    if is_first():
        print(f"note: {note}", file=sys.stderr, flush=True)
