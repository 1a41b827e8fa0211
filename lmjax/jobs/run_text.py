"""Text of runs that have ended, for other models too: written in the tokens of any of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lmjax.config import UserError, replace
from lmjax.console import RunLog
from lmjax.data import Data, TokenizerFolder, prepare
from lmjax.interop.adapter_folder import is_adapter_folder
from lmjax.interop.folder import tokenizer_folder
from lmjax.interop.huggingface import is_model_folder
from lmjax.jobs.text import check_vocabulary
from lmjax.models import TransformerConfig
from lmjax.objectives import TextObjective
from lmjax.remote import local_copy
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import TextFeed


def text_of_run(folder: str) -> tuple[Data, TextObjective] | None:
    """The text that a run was trained on, and what it was trained to do.

    Args:
      folder: run folder, or public model folder.

    Returns:
      None where the folder does not know its text, or the objective makes no examples of text, or
      its loss reads further models.

    Raises:
      UserError: no such folder.
    """
    path = local_copy(folder, "folder")
    if is_adapter_folder(path) or is_model_folder(path):
        return None
    experiment = RunFolder(path).experiment()
    data, objective = (getattr(experiment, name, None) for name in ("data", "objective"))
    if not isinstance(data, Data) or not isinstance(objective, TextObjective):
        return None
    reads_more = experiment.frozen_models() or getattr(objective, "reads_reference", False)
    return None if reads_more else (data, objective)


def read_text(
    data: Data,
    objective: TextObjective,
    folder: str | Path,
    model: TransformerConfig,
    log: RunLog,
    seed: int = 0,
) -> TextFeed:
    """Text in the tokens of the model in a folder, prepared as an objective has it.

    Args:
      data: the text; its tokenizer is not read.
      objective: makes examples.
      folder: run folder or public model folder with the tokenizer.
      model: that reads the examples.
      log: for warnings and progress.
      seed: of the order of the rows.

    Raises:
      UserError: the text or the tokenizer cannot be read, or they do not go with the model.
    """
    objective.check(model)
    if model.max_length is not None and data.length > model.max_length:
        raise UserError(
            f"data.length={data.length} is longer than the {model.max_length} tokens of the model"
            f" in {folder}"
        )
    data = replace(data, tokenizer=TokenizerFolder(path=str(tokenizer_folder(folder))))
    with tempfile.TemporaryDirectory() as made, log.phase("reading the text") as report:
        prepared = prepare(data, made, report)
    check_vocabulary(prepared, model.vocab_size, log.warn)
    return TextFeed(prepared, data.plan(seed), objective, data.length, max(data.sizes))
