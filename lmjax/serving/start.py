"""Makes what is served from folders, and keeps it up to date."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lmjax.config import UserError
from lmjax.data.chat.messages import ChatFormat
from lmjax.generation.run import load, load_run, tell
from lmjax.generation.text import TextGenerator
from lmjax.interop import huggingface
from lmjax.interop.adapter_folder import is_adapter_folder
from lmjax.remote import is_url
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import best_step
from lmjax.serving.engine import Engine
from lmjax.serving.served_model import ServedModel
from lmjax.serving.settings import EngineSettings
from lmjax.serving.weights import ServedWeights
from lmjax.serving.worker import Worker


def served_model(
    name: str,
    text: TextGenerator,
    chat: ChatFormat | str,
    settings: EngineSettings,
    most_tokens: int,
    adapters: Sequence[str] = (),
    draft: TextGenerator | None = None,
) -> ServedModel:
    """A model that is ready to be served; the mesh that it lies on must be set.

    Args:
      name: that requests call it by.
      text: the model.
      chat: see `ServedModel`.
      settings: of the engine.
      most_tokens: see `ServedModel`.
      adapters: folders of adapters of the model.
      draft: a smaller model, which guesses tokens.

    Raises:
      UserError: a model that can neither continue texts nor fill blanks, a folder that holds no
        adapters of it, or a smaller model that does not fit.
    """
    if text.filling is not None:
        if adapters:
            raise UserError("adapters: they are served of models that continue texts alone")
        return ServedModel(name, text, Worker(settings.queue), chat, most_tokens)
    weights = {name: ServedWeights.of(text.generator)}
    for folder in adapters:
        if not is_adapter_folder(folder):
            raise UserError(f"adapters: {folder} holds no adapters (adapter_config.json)")
        own = load(folder, dtype=text.generator.config.dtype).generator
        if own.decoder != text.generator.decoder:
            raise UserError(f"adapters: those in {folder} are of another model than {name}")
        if (title := Path(folder).name) in weights:
            raise UserError(f"adapters: there are two of the name {title!r}")
        shared = _shared(text.generator.weights, own.weights)
        weights[title] = ServedWeights(weights[name].forward, shared)
    smaller = None if draft is None else ServedWeights.of(draft.generator)
    if draft is not None and draft.tokenizer.fingerprint != text.tokenizer.fingerprint:
        raise UserError("draft: its tokenizer is another than the model's")
    engine = Engine(weights, settings, smaller)
    return ServedModel(name, text, engine, chat, most_tokens)


def _shared(base: Any, own: Any) -> Any:
    """Weights of which those that are as the base's take no memory of their own."""

    def one(theirs: jax.Array, ours: jax.Array) -> jax.Array:
        return theirs if bool((theirs == ours).all()) else ours

    return jax.tree.map(one, base, own)


@contextlib.contextmanager
def watch_run(
    folder: str,
    served: ServedModel,
    mesh: Any,
    step: int | None,
    seconds: float,
    dtype: Any = None,
) -> Iterator[None]:
    """Meanwhile serves each newer checkpoint of a run, once it is there.

    Answers that are being written go on with the weights that they began with.

    Args:
      folder: that is served.
      served: what it was loaded to.
      mesh: that it lies on.
      step: `served_step` before it was loaded; None: it stays as it is.
      seconds: between two looks; 0: none.
      dtype: as in `load_run`.
    """
    if not seconds or step is None or not isinstance(served.worker, Engine):
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(folder, served, mesh, step, seconds, dtype, stop), name="checkpoints"
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def served_step(folder: str) -> int | None:
    """The checkpoint that `load_run` takes; None for what is no run on this machine."""
    if is_url(folder) or huggingface.is_model_folder(folder) or is_adapter_folder(folder):
        return None
    if not (checkpoints := RunFolder(Path(folder)).checkpoints).is_dir():
        return None
    checkpointer = Checkpointer(checkpoints)
    best = best_step(checkpointer)
    return checkpointer.latest() if best is None else best


def _watch(folder, served, mesh, step, seconds, dtype, stop) -> None:
    while not stop.wait(seconds):
        try:
            if (newest := served_step(folder)) == step or newest is None:
                continue
            with jax.set_mesh(mesh):
                generator = load_run(folder, step=newest, dtype=dtype).generator
                served.worker.set_weights(served.name, ServedWeights.of(generator))
            step = newest
            tell(f"serving step {step} of {folder}")
        except UserError as error:  # a checkpoint that is being removed, for instance
            tell(f"{folder}: no newer checkpoint could be read: {error}")
