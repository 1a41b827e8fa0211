"""The tokens that the augmentation of a job knows, and the model that it refills texts with."""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError, replace
from lmjax.data.public_tokenizers import TokenizerFolder, read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.interop import adapter_folder, huggingface
from lmjax.interop.folder import model_folder, tokenizer_folder
from lmjax.models.infill import BlankFormat, InfillFormat
from lmjax.objectives import Augmentation
from lmjax.remote import local_copy
from lmjax.runs.trained_model import read_experiment


def with_special_tokens(job: Any) -> Any:
    """The job with the ids that its augmentation leaves alone, and those that it refills with.

    Args:
      job: a config with `objective.augmentation` and `data`.

    Raises:
      UserError: the tokenizer is not known yet, or the model of `refill_with` does not fit.
    """
    augmentation = job.objective.augmentation
    if augmentation is None:
        return job
    if not isinstance(job.data.tokenizer, TokenizerFolder):
        raise UserError(
            "objective.augmentation leaves special tokens alone, which only a tokenizer that is"
            " there has: give begin_with, or data.tokenizer=TokenizerFolder(path=...)"
        )
    tokenizer = read_tokenizer(job.data.tokenizer.path)
    if augmentation.refill_with is not None:
        augmentation = _with_marks(augmentation, tokenizer, job.data.length)
    special = tuple(sorted(set(tokenizer.special.values())))
    augmentation = replace(augmentation, special=special)
    return replace(job, objective=replace(job.objective, augmentation=augmentation))


def _with_marks(augmentation: Augmentation, tokenizer: Tokenizer, length: int) -> Augmentation:
    """The augmentation with the ids of the tokens that its model knows hidden words by."""
    folder = augmentation.refill_with
    where, model = f"augmentation.refill_with={folder}", model_folder(folder)
    mask = _special(tokenizer, "mask", augmentation.mask)
    infill = infill_format_of(folder) if model.attention.causal else None
    if not model.word_head or (model.attention.causal and not isinstance(infill, BlankFormat)):
        raise UserError(
            f"{where} is no masked model, an encoder with a head of words, nor one that fills"
            " blanks, as a GLM does"
        )
    if read_tokenizer(tokenizer_folder(folder)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{where} has another tokenizer than the run")
    if model.max_length is not None and length > model.max_length:
        raise UserError(
            f"{where} reads at most {model.max_length} tokens; data.length={length} is more"
        )
    if infill is None:
        return replace(augmentation, mask_id=mask, start_id=None)
    known = [name for name in infill.masks if name not in infill.run_on]
    if augmentation.mask not in known:
        raise UserError(
            f"augmentation.mask={augmentation.mask!r}: {where} knows blanks inside of a text by"
            f" {', '.join(known)}"
        )
    start = _special(tokenizer, "refill_with", infill.sop)
    return replace(augmentation, mask_id=mask, start_id=start)


def _special(tokenizer: Tokenizer, setting: str, name: str) -> int:
    """The id of a special token. UserError where the tokenizer lacks it."""
    found = tokenizer.special.get(name)
    if found is None:
        raise UserError(
            f"augmentation.{setting}={name!r} is no special token of the tokenizer; it has"
            f" {', '.join(tokenizer.special)}"
        )
    return found


def infill_format_of(folder: str) -> InfillFormat | None:
    """Format in which the model in a folder fills blanks; None: it continues texts."""
    path = local_copy(folder, "folder")
    if adapter_folder.is_adapter_folder(path):
        path = adapter_folder.base_folder(path)
    if huggingface.is_model_folder(path):
        return huggingface.read_config(path)[0].infill
    objective = getattr(read_experiment(path), "objective", None)
    return None if objective is None else objective.infill_format()
