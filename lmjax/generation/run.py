"""A model from its folder: of a run of ours, or a public one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

from lmjax.config import UserError, replace
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.generation.chat import chat_template, fitting_template, templates
from lmjax.generation.fill import infiller_by, infiller_of
from lmjax.generation.generator import Generator
from lmjax.generation.jinja_format import JinjaFormat
from lmjax.generation.messages import ChatFormat
from lmjax.generation.text import TextGenerator
from lmjax.generation.weights import layers_apart
from lmjax.interop import huggingface
from lmjax.interop.adapter_folder import base_folder, is_adapter_folder, read_adapted, text_folder
from lmjax.interop.huggingface import Dtype
from lmjax.interop.kept_files import (
    DEFAULT,
    TOOL_USE,
    read_end_ids,
    read_special_names,
    read_templates,
)
from lmjax.launch import is_first
from lmjax.models import TransformerConfig
from lmjax.models.transformer import NO_HEAD
from lmjax.parallel import Layout, generation_layout
from lmjax.remote import local_copy
from lmjax.runs.trained_model import beyond_table, load_trained_model, read_experiment


def load(
    folder: str | os.PathLike, layout: Layout | None = None, dtype: Dtype | None = None
) -> TextGenerator:
    """The model of a run folder (`load_run`) or of a public model folder (`load_model`).

    The folder may be a URL: what is there is copied to the cache folder first.
    """
    folder = local_copy(folder, "folder")
    if not (is_adapter_folder(folder) or huggingface.is_model_folder(folder)):
        return load_run(folder, layout, dtype=dtype)
    try:
        return load_model(folder, layout, dtype)
    except UserError as error:
        raise UserError(
            "\n".join(filter(None, (str(error), huggingface.assumption(folder))))
        ) from None


def load_model(
    folder: str | os.PathLike, layout: Layout | None = None, dtype: Dtype | None = None
) -> TextGenerator:
    """The model of a folder that transformers reads, with its tokenizer, on the mesh that is set.

    Args:
      folder: config.json, safetensors, and a tokenizer (see `read_tokenizer`); or PEFT's adapters
        for such a model.
      layout: how the model is cut over the mesh; None is `generation_layout()`.
      dtype: what is computed in; None: float32.

    Raises:
      UserError: see `interop.huggingface.read`; or a tokenizer that is missing or does not fit.
    """
    layout = generation_layout() if layout is None else layout
    folder = local_copy(folder, "folder")
    tokenizer = read_tokenizer(text_folder(folder))
    adapters, base = is_adapter_folder(folder), model_of(folder)
    family, config = huggingface.read_config(base)
    if not config.word_head:
        raise UserError(f"{folder}: {NO_HEAD}")
    if adapters:
        config, _, params = read_adapted(folder, layout)
    else:
        _, params = huggingface.read_params(folder, family, config, layout, apart=layers_apart())
    if unused := beyond_table(tokenizer, config.vocab_size):
        tell(f"{folder}: {unused}")
    filling = infiller_by(family.infill)
    generator = Generator(computed_in(config, dtype), params, layout)
    return TextGenerator(generator, tokenizer, filling, ends_of(text_folder(folder), config))


def model_of(folder: Path) -> Path:
    """The folder with the weights: of adapters, that of their model."""
    return base_folder(folder) if is_adapter_folder(folder) else folder


def load_run(
    folder: str | os.PathLike,
    layout: Layout | None = None,
    step: int | None = None,
    dtype: Dtype | None = None,
) -> TextGenerator:
    """The model of a training run, with its tokenizer, on the mesh that is set.

    Where the run keeps an average of the parameters, the average is taken.

        with jax.set_mesh(Mesh().build()):
            print(load_run("runs/quickstart").generate(["The list"])[0])

    Args:
      folder: what a training run wrote: config.json, checkpoints/, tokenizer/. It may go on.
      layout: how the model is cut over the mesh; None is `generation_layout()`.
      step: which checkpoint; None is the newest undamaged one.
      dtype: what is computed in; None: what the run was trained in, but float32 on a CPU.

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
    generator = Generator(computed_in(trained.config, dtype), trained.params, layout)
    filling = infiller_of(trained.objective)
    return TextGenerator(generator, trained.tokenizer, filling, ends_of(folder, trained.config))


def computed_in(config: TransformerConfig, dtype: Dtype | None) -> TransformerConfig:
    """The config with the precision to decode in; says where it is not the config's own."""
    if dtype is None and config.dtype == "bfloat16" and jax.default_backend() == "cpu":
        tell("computing in float32, as bfloat16 is slower on a CPU; dtype=bfloat16 asks for it")
        dtype = "float32"
    return config if dtype in (None, config.dtype) else replace(config, dtype=dtype)


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


def chat_format(folder: str | os.PathLike, tokenizer: Tokenizer, name: str = "true") -> ChatFormat:
    """Chat format of a folder's model.

    Args:
      folder: a run folder or a public model's.
      tokenizer: the folder's.
      name: "true": the folder's own template; where it has none, the format that is known for the
        public models of its family; for a run, which has read texts, plain. Else the name of one of
        the folder's templates, or of one of ours.

    Raises:
      UserError: a public model whose format is not known, a damaged template, or no such name.
    """
    folder = text_folder(folder)
    templates = read_templates(folder)
    with_tools = templates.get(TOOL_USE) if name == "true" else None
    name_there = DEFAULT if name == "true" else name
    if name_there in templates:
        template, special = templates[name_there], tokenizer.special
        names = {token: name for name, token in special.items()}
        tokens = {"bos_token": names.get(tokenizer.begin), "eos_token": names.get(tokenizer.end)}
        tokens |= read_special_names(folder)
        return JinjaFormat(
            source=template.source,
            title=f"{template.file} of the folder",
            special=frozenset(special),
            tokens={role: token for role, token in tokens.items() if token is not None},
            with_tools=None if with_tools is None else with_tools.source,
        )
    if name != "true":
        check_chat(folder, name)
        return chat_template(name)
    if templates:
        raise UserError(
            f"chat=true: {folder} has several chat templates; give the name of one:"
            f" {', '.join(templates)}"
        )
    kind, config = kind_of(folder)
    try:
        fitting = "plain" if kind is None else fitting_template(kind, tokenizer, config)
        return chat_template(fitting)
    except UserError as error:
        raise UserError(f"chat=true: {folder} has no chat template, and {error}") from None


def check_chat(folder: str | os.PathLike, name: str) -> None:
    """Raises UserError for a name of a chat format that neither the folder nor we have."""
    theirs = read_templates(text_folder(folder))
    if name != "true" and name not in theirs and name not in (ours := templates()):
        known = ", ".join([*theirs, *ours])
        raise UserError(f"chat: there is no chat template {name!r}, only {known}")


def kind_of(folder: Path) -> tuple[str | None, TransformerConfig]:
    """The model_type of a folder's public model, None for one trained here; and its config."""
    folder = model_of(folder)
    if huggingface.is_model_folder(folder):
        family, config = huggingface.read_config(folder)
        return family.model_type, config
    experiment = read_experiment(folder)
    return getattr(experiment, "family", None), experiment.model  # of `ConvertedModel`
