"""A model from its folder: of a run of ours, or a public one."""

from __future__ import annotations

import os
import pathlib

from lmjax.config import UserError
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.generation.chat import fitting_template
from lmjax.generation.fill import family_filling, filling_of
from lmjax.generation.generator import Generator
from lmjax.generation.text import TextGenerator
from lmjax.generation.unstacked import layers_apart
from lmjax.interop import huggingface
from lmjax.parallel import Layout, generation_layout
from lmjax.training.trained import read_trained


def load(folder: str | os.PathLike, layout: Layout | None = None) -> TextGenerator:
    """The model of a run folder (`load_run`) or of a public model folder (`load_model`)."""
    read = load_model if huggingface.is_model_folder(folder) else load_run
    return read(folder, layout)


def load_model(folder: str | os.PathLike, layout: Layout | None = None) -> TextGenerator:
    """The model of a folder that transformers reads, with its tokenizer, on the mesh that is set.

    Args:
      folder: config.json, safetensors, and a tokenizer (see `read_tokenizer`).
      layout: how the model is cut over the mesh; None is `generation_layout()`.

    Raises:
      UserError: see `interop.huggingface.read`; or a tokenizer that is missing or does not fit.
    """
    layout = generation_layout() if layout is None else layout
    folder = pathlib.Path(folder).expanduser()
    tokenizer = read_tokenizer(folder)
    family, config = huggingface.read_config(folder)
    _, params = huggingface.read_params(folder, family, config, layout, apart=layers_apart())
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, more than the"
            f" {config.vocab_size} of the model"
        )
    filling = family_filling(family.model_type, tokenizer)
    return TextGenerator(Generator(config, params, layout), tokenizer, filling)


def load_run(
    folder: str | os.PathLike, layout: Layout | None = None, step: int | None = None
) -> TextGenerator:
    """The model of a training run, with its tokenizer, on the mesh that is set.

    Where the run keeps an average of the parameters, the average is taken.

        with jax.set_mesh(Mesh().build()):
            print(load_run("runs/quickstart").generate(["The list"])[0])

    Args:
      folder: what a training run wrote: config.json, checkpoints/, tokenizer/. It may go on.
      layout: how the model is cut over the mesh; None is `generation_layout()`.
      step: which checkpoint; None is the newest undamaged one.

    Raises:
      UserError: not a run folder, no checkpoint, a damaged one, or a tokenizer that does not fit.
    """
    layout = generation_layout() if layout is None else layout
    trained = read_trained(folder, layout, step)
    if trained.tokenizer is None:
        raise UserError(f"there is no tokenizer in {folder}: text needs one")
    generator = Generator(trained.config, trained.params, layout)
    return TextGenerator(generator, trained.tokenizer, filling_of(trained.objective))


def chat_format(folder: str | os.PathLike, tokenizer: Tokenizer) -> str:
    """The name of the chat template of a folder's model: a run's, which read texts, is plain.

    Raises:
      UserError: a public model whose format is not known.
    """
    if not huggingface.is_model_folder(folder):
        return "plain"
    family, config = huggingface.read_config(pathlib.Path(folder).expanduser())
    name = family.model_type
    if name == "baichuan" and config.normalized_head:
        name = "baichuan2"  # whose folders bear the first one's model_type
    return fitting_template(name, tokenizer)
