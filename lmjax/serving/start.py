"""Makes what is served from folders, and keeps it up to date."""

from __future__ import annotations

import contextlib
import math
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
from lmjax.parallel import Mesh
from lmjax.parallel.mesh import AXES
from lmjax.remote import is_url
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import best_step
from lmjax.serving.engine import Engine
from lmjax.serving.replicas import AnyEngine, Replicas
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
    meshes: Sequence[jax.sharding.Mesh] = (),
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
      meshes: of `serving_meshes`; none: the one that is set.

    Raises:
      UserError: a model that can neither continue texts nor fill blanks, a folder that holds no
        adapters of it, or a smaller model that does not fit.
    """
    if text.filling is not None:
        if adapters:
            raise UserError("adapters: they are served of models that continue texts alone")
        if len(meshes) > 1:
            raise UserError("mesh.data: there are replicas of models that continue texts alone")
        return ServedModel(name, text, Worker(settings.queue), chat, most_tokens)
    if text.reads_prefix:
        tell(
            f"{name} reads prompts from both sides (PrefixLM): each is read at once, not in parts"
            " of engine.chunk, and no beginning is kept (engine.prefix_cache)"
        )
    weights = {name: ServedWeights.of(text.generator, text.reads_prefix)}
    for folder in adapters:
        if not is_adapter_folder(folder):
            raise UserError(f"adapters: {folder} holds no adapters (adapter_config.json)")
        generator = text.generator
        own = load(folder, generator.layout, generator.config.dtype).generator
        if own.decoder != text.generator.decoder:
            raise UserError(f"adapters: those in {folder} are of another model than {name}")
        if (title := Path(folder).name) in weights:
            raise UserError(f"adapters: there are two of the name {title!r}")
        shared = _shared(text.generator.weights, own.weights)
        weights[title] = ServedWeights(weights[name].forward, shared, text.reads_prefix)
    smaller = None if draft is None else ServedWeights.of(draft.generator, draft.reads_prefix)
    if draft is not None and draft.tokenizer.fingerprint != text.tokenizer.fingerprint:
        raise UserError("draft: its tokenizer is another than the model's")
    if len(meshes) > 1:
        engine = Replicas(weights, settings, smaller, meshes)
    else:
        engine = Engine(weights, settings, smaller)
    return ServedModel(name, text, engine, chat, most_tokens)


def serving_meshes(mesh: Mesh, devices: Sequence[jax.Device]) -> list[jax.sharding.Mesh]:
    """The mesh of each replica, on the first devices, or on all where an axis is -1.

    Args:
      mesh: its `data` is the number of replicas, `fsdp` and `tensor` cut each of them.
      devices: of this process.

    Raises:
      UserError: an axis that a server has no use for, or too few devices.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    used = ("data", "fsdp", "tensor")
    if wrong := [axis for axis, size in sizes.items() if axis not in used and size != 1]:
        raise UserError(
            f"mesh.{wrong[0]}={sizes[wrong[0]]}: a server is cut over fsdp and tensor, and has"
            " replicas over data"
        )
    if -1 not in sizes.values():
        devices = devices[: math.prod(sizes.values())]
    sizes = dict(zip(AXES, mesh.sizes(len(devices))))
    one, each = Mesh(fsdp=sizes["fsdp"], tensor=sizes["tensor"]), len(devices) // sizes["data"]
    return [one.build(devices[begin : begin + each]) for begin in range(0, len(devices), each)]


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
    if not seconds or step is None or not isinstance(served.worker, AnyEngine):
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
                layout = served.text.generator.layout
                newer = load_run(folder, layout, newest, dtype)
                weights = ServedWeights.of(newer.generator, newer.reads_prefix)
                served.worker.set_weights(served.name, weights)
            step = newest
            tell(f"serving step {step} of {folder}")
        except UserError as error:  # a checkpoint that is being removed, for instance
            tell(f"{folder}: no newer checkpoint could be read: {error}")
