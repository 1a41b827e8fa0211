"""The teacher of a training job with `distillation`: its model, and checks that it fits."""

from __future__ import annotations

from typing import Any

from lmjax.config import UserError
from lmjax.console import RunLog
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.interop.folder import model_folder, tokenizer_folder
from lmjax.jobs.settings import Distillation
from lmjax.models import TransformerConfig
from lmjax.objectives import Distilled, Objective


def teacher_of(job: Any) -> TransformerConfig:
    """The teacher's model.

    Args:
      job: a training job with `distillation`.

    Raises:
      UserError: there is none in the folder, its tokens are not the student's, or it cannot read
        what the student reads.
    """
    where = f"distillation.teacher={job.distillation.teacher}"
    try:
        teacher = model_folder(job.distillation.teacher)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None
    ours, theirs = job.model.vocab_size, teacher.vocab_size
    if ours != theirs:
        raise UserError(
            f"{where} has a vocabulary of {theirs:,} tokens, the student one of {ours:,}: their"
            f" predictions cannot be compared; set model.vocab_size={theirs}, with the teacher's"
            " tokenizer"
        )
    if not teacher.word_head:
        raise UserError(f"{where} has no head that predicts words")
    objective = distilled(job.distillation, job.objective)
    objective.check_pair(job.model, teacher)
    try:
        objective.check(teacher)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    longest, length = teacher.max_length, getattr(getattr(job, "data", None), "length", 0)
    if longest is not None and length > longest:
        raise UserError(f"{where} reads at most {longest} tokens; data.length={length} is longer")
    return teacher


def distilled(settings: Distillation, objective: Objective) -> Distilled:
    """The objective of a student."""
    return Distilled(objective=objective, teacher_loss=settings)


def check_tokens(settings: Distillation, tokenizer: Tokenizer | None, log: RunLog) -> None:
    """Raises UserError where the teacher knows other tokens than those of the text.

    Args:
      settings: which teacher.
      tokenizer: of the text that is trained on; None where there is none.
      log: for the warning that the teacher's tokenizer cannot be read.
    """
    if tokenizer is None:
        return
    where = tokenizer_folder(settings.teacher)
    try:
        theirs = read_tokenizer(where)
    except UserError as error:
        log.warn(f"whether the teacher knows the same tokens is not known: {error}")
        return
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"distillation.teacher={settings.teacher} has another tokenizer than the text here"
            f" (fingerprints {theirs.fingerprint} and {tokenizer.fingerprint}), so its predictions"
            f" are of other tokens: set data.tokenizer='TokenizerFolder(path=\"{where}\")'"
        )
