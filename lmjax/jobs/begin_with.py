"""Parameters that training begins with, from another run or a public model's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from lmjax.config import UserError, replace
from lmjax.console import RunLog, Stopwatch
from lmjax.data import TokenizerConfig, TokenizerFolder, TrainedBPE, WithTokens
from lmjax.data.chat.folder import FolderTemplate, read_templates
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.chat.templated import template_of
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer, old_pieces
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers.subwords import SentencePieceTokenizer
from lmjax.generation.run import reads_prefix
from lmjax.interop.folder import is_upcycled, model_folder, read_params, tokenizer_folder
from lmjax.interop.huggingface import architecture_of, is_model_folder
from lmjax.interop.kept_files import keep
from lmjax.launch import is_first
from lmjax.models import TransformerConfig
from lmjax.models.upcycling import dense_model
from lmjax.remote import local_copy
from lmjax.runs.changes import differences
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import read_experiment
from lmjax.training.learner import Learner

LEARNT = TrainedBPE()  # the tokenizer of `Data` where none is given


def read_parameters(
    source: str | None,
    learner: Learner,
    seed: int,
    tokenizer: Tokenizer | None,
    folder: RunFolder,
    log: RunLog,
) -> dict | None:
    """Parameters of `source` for the learner's model; differences of the two are logged.

    Args:
      source: run folder or public model folder; None: training begins with random parameters.
      learner: its model and layout.
      seed: of parameters that the source lacks.
      tokenizer: of the text that is trained on; None where there is none.
      folder: of the run, which keeps the source's chat template and its like.
      log: for facts and warnings.

    Raises:
      UserError: no such folder, or its parameters are not those of the model.
    """
    if source is None:
        return None
    watch = Stopwatch()
    params = read_params(source, learner.model, learner.layout, seed)
    log.fact("begins with", f"the parameters in {source}", watch.seconds())
    before = model_folder(source)
    theirs, ours = map(architecture_of, (before, learner.model))
    _warn_of_frozen_tokens(before.vocab_size, learner, log)
    names = [{head.name for head in model.heads} for model in (theirs, ours)]
    if fresh := names[1] - names[0]:
        log.fact("afresh", f"the head {', '.join(sorted(fresh))}, which {source} lacks")
    theirs, ours = (_with_heads(model, names[0] & names[1]) for model in (theirs, ours))
    if is_upcycled(theirs, ours):
        log.fact("afresh", f"the routers; each expert is a copy of the dense layer in {source}")
        ours = dense_model(ours)
    for name, there, here in differences(theirs, ours):
        log.warn(f"model.{name} is {here} here; in {source} it is {there}")
    if tokenizer is None:
        return params
    where = tokenizer_folder(source)
    try:
        alike = _keeps_tokens(read_tokenizer(where), tokenizer)
    except UserError as error:
        log.warn(f"whether it knows the same tokens is not known: {error}")
        return params
    if not alike:
        log.warn(
            f"the tokenizer is not that of {source}, so its tokens may mean something "
            f'else; data.tokenizer=TokenizerFolder(path="{where}") takes it from there'
        )
    elif is_first():
        keep(local_copy(source, "begin_with"), folder.path)
    return params


def _with_heads(model: TransformerConfig, names: set[str]) -> TransformerConfig:
    """A model with those of its heads on labels that have these names."""
    return replace(model, heads=tuple(head for head in model.heads if head.name in names))


def _warn_of_frozen_tokens(known: int, learner: Learner, log: RunLog) -> None:
    """Logs that new tokens keep one vector, the mean of the old ones, and so stay one token."""
    new, trains = learner.model.vocab_size - known, learner.trained.trains
    if new > 0 and trains is not None and not trains("embedding.table"):
        log.warn(
            f"{new} tokens are new to the model and begin alike; `trainable` leaves them so, and "
            "the model cannot tell them apart: train the embedding too, and the head where it is "
            'another table, as trainable=Matching trainable.patterns=\'("*.adapter.*", '
            '"embedding.*")\''
        )


def _keeps_tokens(before: Tokenizer, tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer is another one, perhaps with more tokens behind its ids."""
    while isinstance(tokenizer, ExtendedTokenizer) and tokenizer.fingerprint != before.fingerprint:
        tokenizer = tokenizer.inner
    if isinstance(before, SentencePieceTokenizer) and isinstance(tokenizer, SentencePieceTokenizer):
        with contextlib.suppress(UserError):
            old_pieces(before, tokenizer)
            return True
    return tokenizer.fingerprint == before.fingerprint


def with_starting_model(
    job: Any,
    adapt: Callable[[TransformerConfig], TransformerConfig] = lambda model: model,
    lacks_head: Callable[[TransformerConfig], bool] = lambda model: False,
) -> Any:
    """A job with the model and the tokenizer of `begin_with`, where none are given.

    The model gets a row for each special token that the tokenizer adds.

    Args:
      job: a config with `begin_with`, `model` (None: none is given) and `data`.
      adapt: makes the model that is trained of the one in the folder.
      lacks_head: tells of a model that is given whether it has to be adapted too.

    Raises:
      UserError: there is no model, or no tokenizer, in the folder.
    """
    if job.model is not None and lacks_head(job.model):
        job = replace(job, model=adapt(job.model))
    if job.begin_with is None:
        return job
    try:
        tokenizer, model = tokenizer_of(job.data.tokenizer, job.begin_with), job.model
        found = model_folder(job.begin_with) if model is None else model
    except UserError as error:
        raise UserError(f"begin_with: {error}") from None
    if model is None:
        model = found
        size = max(model.vocab_size, _vocab_size(tokenizer))
        model = adapt(replace(model, vocab_size=size))
    return replace(job, model=model, data=replace(job.data, tokenizer=tokenizer))


def tokenizer_of(given: TokenizerConfig, begin_with: str) -> TokenizerConfig:
    """The tokenizer of a folder in place of the default, also inside `WithTokens`.

    Raises:
      UserError: there is none in the folder.
    """
    if isinstance(given, WithTokens):
        return replace(given, tokenizer=tokenizer_of(given.tokenizer, begin_with))
    if given != LEARNT:
        return given
    return TokenizerFolder(path=str(tokenizer_folder(begin_with)))


def _vocab_size(tokenizer: TokenizerConfig) -> int:
    """Tokens of a folder's tokenizer with those that are added; 0 where none are."""
    if not isinstance(tokenizer, WithTokens):
        return 0
    inner, added = tokenizer.tokenizer, len(tokenizer.tokens)
    if isinstance(inner, TokenizerFolder):
        return read_tokenizer(inner.path).vocab_size + added
    return _vocab_size(inner) + added


def warn_of_format(job: Any, log: RunLog) -> None:
    """Logs that the model of `begin_with` was trained in another chat format than the job's data.

    Args:
      job: a config with `begin_with` and `data`.
      log: for the warning.
    """
    if job.begin_with is not None:
        remedy = (
            "give the sources in data.train the model's template, unless it shall learn another"
        )
        warn_of_template(job.begin_with, template_of(job.data), log, f"{remedy} one")


def warn_of_template(source: str, ours: ChatFormat | None, log: RunLog, remedy: str) -> None:
    """Logs that a model was trained in another chat format than that of some text.

    Args:
      source: run folder or public model folder of the model.
      ours: format of the text; None where it has none.
      log: for the warning.
      remedy: last words of the warning.
    """
    if ours is None or isinstance(ours, FolderTemplate):
        return
    folder = local_copy(source, "begin_with")
    if is_model_folder(folder):
        theirs = "a chat template of its own" if read_templates(folder) else ""
    else:
        data = getattr(read_experiment(folder), "data", None)
        before = template_of(data) if data is not None else None
        theirs = f"the chat format {before.title}" if before not in (None, ours) else ""
    if theirs:
        log.warn(f"{source} has {theirs}, and the text here is written as {ours.title}: {remedy}")


def refuse_prefix_model(source: str) -> None:
    """Raises UserError for a model that learned to read prompts from both sides.

    Args:
      source: folder that a job begins with whose model reads prompts from left to right.
    """
    if reads_prefix(source):
        raise UserError(
            f"begin_with={source}: its model learned to read prompts from both sides (objective="
            "PrefixLM), and this job reads them from left to right: train it with"
            " objective=CausalLM first"
        )
