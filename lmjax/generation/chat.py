"""Chat formats of models: which one a folder's model was trained with."""

from __future__ import annotations

import os
from pathlib import Path

from lmjax.config import UserError
from lmjax.data.chat.catalogue import chat_template, fitting_template, templates
from lmjax.data.chat.folder import folder_format, read_templates
from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.data.chat.templates import PLAIN, ChatTemplate
from lmjax.data.tokenizers import Tokenizer
from lmjax.generation.run import model_of, template_of_run
from lmjax.interop import huggingface
from lmjax.interop.adapter_folder import text_folder
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import read_experiment

__all__ = ["ChatFormat", "Message", "chat_format", "chat_template", "check_chat"]


def chat_format(folder: str | os.PathLike, tokenizer: Tokenizer, name: str = "true") -> ChatFormat:
    """Chat format of a folder's model.

    Args:
      folder: a run folder or a public model's.
      tokenizer: the folder's.
      name: "true": the format of the conversations that a run was trained on, where it is one of
        ours; else the folder's own template; where it has none, the format that is known for the
        public models of its family; for a run that has read texts alone, plain. Else the name of
        one of the folder's templates, or of one of ours.

    Raises:
      UserError: a public model whose format is not known, a damaged template, or no such name.
    """
    folder = text_folder(folder)
    if name == "true" and isinstance(ours := _own_format(folder), ChatTemplate):
        return ours  # the folder's template may be that of the model that the run began with
    found = folder_format(folder, tokenizer, None if name == "true" else name)
    if found is not None:
        return found
    if name != "true":
        check_chat(folder, name)
        return chat_template(name)
    if several := read_templates(folder):
        raise UserError(
            f"chat=true: {folder} has several chat templates; give the name of one:"
            f" {', '.join(several)}"
        )
    try:
        return _trained_format(folder, tokenizer)
    except UserError as error:
        raise UserError(f"chat=true: {folder} has no chat template, and {error}") from None


def check_chat(folder: str | os.PathLike, name: str) -> None:
    """Raises UserError for a name of a chat format that neither the folder nor we have."""
    theirs = read_templates(text_folder(folder))
    if name != "true" and name not in theirs and name not in (ours := templates()):
        known = ", ".join([*theirs, *ours])
        raise UserError(f"chat: there is no chat template {name!r}, only {known}")


def _trained_format(folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    """The format that a model without a template in its folder was trained with."""
    folder = model_of(folder)
    if huggingface.is_model_folder(folder):
        family, config = huggingface.read_config(folder)
        return chat_template(fitting_template(family.model_type, tokenizer, config))
    experiment = read_experiment(folder)
    if (family := getattr(experiment, "family", None)) is not None:  # of `ConvertedModel`
        return chat_template(fitting_template(family, tokenizer, experiment.model))
    return _own_format(folder) or PLAIN


def _own_format(folder: Path) -> ChatFormat | None:
    """The format of the conversations that a run was trained on; None where there are none."""
    if not RunFolder(folder).config.is_file() or huggingface.is_model_folder(folder):
        return None
    return template_of_run(folder)
