"""Checkpoints: written beside the training, visible only when complete, checked before use.

A checkpoint is a folder named by its step, with the arrays as Orbax writes them and a manifest.
While it is written the folder has another name (`.saving-STEP`), so whatever kills the process, a
folder with a step's name is complete.
"""

import errno
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

from lmjax.config import UserError
from lmjax.training import manifest

ARRAYS = "arrays"  # what Orbax writes, inside a checkpoint
SAVING, REMOVING = ".saving-", ".removing-"  # names of folders that are no checkpoints
MARGIN = 1 << 20  # bytes that a checkpoint may take beside its arrays


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Checkpointer:
    """Saves and restores pytrees of arrays in one folder, by step.

    Reading changes nothing, so a run may be looked at while it goes on. All processes of a run make
    the same calls; the folder is one that all of them see. Used as a context manager, or closed.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
        warn: Callable[[str], None] = _say,
    ):
        """Nothing is read or written yet.

        Args:
          folder: where the checkpoints are, or will be.
          keep: how many of the newest stay, at least one.
          keep_every: checkpoints of multiples of this step stay for ever; None: none do.
          asynchronous: write while training goes on.
          warn: is told what a person should know, as that a damaged checkpoint was passed over.
        """
        if keep < 1:
            raise UserError(f"keep={keep}: at least the newest checkpoint has to stay")
        self.folder = Path(folder).absolute()
        self.keep, self.keep_every = keep, keep_every
        self.asynchronous, self.warn = asynchronous, warn
        self._writer: Any = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of all checkpoints that were completed, damaged or not, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def latest(self) -> int | None:
        """The newest step whose files are all there in their lengths; None where there is none."""
        for step in reversed(self.steps()):
            try:
                manifest.read(self._path(step))
            except manifest.Damaged:
                continue
            return step
        return None

    def save(self, step: int, tree: PyTree, extra: Mapping[str, Any]) -> None:
        """Begins to save, and returns when `tree` may be donated; ends the save before this first.

        A checkpoint of the same step is replaced.

        Args:
          step: names the checkpoint.
          tree: arrays on any mesh, typed random keys among them.
          extra: what else it takes to go on, as JSON; `step` is added.

        Raises:
          UserError: the disk is full, or was for the save before. Nothing of that checkpoint is
            left; those before are intact.
        """
        self.wait()
        arrays = _by_name(tree)
        extra = json.loads(json.dumps({**extra, "step": step}, allow_nan=False))
        try:
            self._prepare(step, arrays)
            self._writer.save(
                self._path(step, SAVING) / ARRAYS, args=_orbax().args.PyTreeSave(arrays)
            )
        except Exception as error:
            raise self._clear_away(step, error) from error
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
        self._thread = threading.Thread(target=self._finish, args=(step, shapes, extra))
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          UserError: it failed because the disk is full.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            step, error = self._failure
            self._failure = None
            raise self._clear_away(step, error) from error

    def close(self) -> None:
        """Completes the last save and lets go of Orbax's threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def restore(self, step: int | None, abstract: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """The arrays of a checkpoint where `abstract` wants them, and the `extra` beside them.

        Args:
          step: which checkpoint; None for the newest undamaged one.
          abstract: a tree of arrays or shapes with shardings, on any mesh; it may leave out whole
            entries of the saved tree's top level, which are then not read.

        Returns:
          None where the folder holds no checkpoint.

        Raises:
          UserError: the checkpoint is of another model, every candidate is damaged, or there is
            none of that step.
        """
        self.wait()
        chosen = self._choose(step)
        if chosen is None:
            return None
        path = self._path(chosen)
        body = manifest.read(path)
        wanted = {name: _placed(leaf) for name, leaf in _by_name(abstract).items()}
        entries = {_entry(name) for name in wanted}
        saved = {name: a for name, a in body["arrays"].items() if _entry(name) in entries}
        if lines := manifest.differences(saved, wanted):
            raise UserError(
                "\n    ".join((f"The checkpoint {path} is of another model or optimizer:", *lines))
            )
        orbax = _orbax()
        with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(
                path / ARRAYS,
                args=orbax.args.PyTreeRestore(
                    item=wanted,
                    restore_args=orbax.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), body["extra"]

    def _path(self, step: int, prefix: str = "") -> Path:
        return self.folder / f"{prefix}{step}"

    def _prepare(self, step: int, arrays: Mapping[str, jax.Array]) -> None:
        """Makes room for a save: removes what a killed process left, looks at the disk."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if path.name.startswith((SAVING, REMOVING)):
                    shutil.rmtree(path)
            needed = sum(a.nbytes for a in arrays.values() if not _is_key(a)) + MARGIN
            # Orbax, once it runs out of space, tells it to the screen in a thousand lines.
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed")
        if self._writer is None:
            orbax = _orbax()
            # Compressing random bits takes ten times as long as writing them and gains 7 percent.
            handler = orbax.PyTreeCheckpointHandler(use_compression=False)
            self._writer = orbax.AsyncCheckpointer(handler)

    def _finish(self, step: int, shapes: manifest.Arrays, extra: Mapping[str, Any]) -> None:
        """Waits for Orbax, adds the manifest, gives the checkpoint its name, removes old ones."""
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(self._path(step, SAVING), shapes, extra)
                if self._path(step).exists():
                    self._remove(step)
                self._path(step, SAVING).rename(self._path(step))
                for old in self._superseded(step):
                    self._remove(old)
        except Exception as error:
            self._failure = step, error

    def _superseded(self, newest: int) -> Iterator[int]:
        """Steps that the keep policy gives up; those after `newest` are not its business."""
        before = [step for step in self.steps() if step <= newest]
        for step in before[: -self.keep]:
            if self.keep_every is None or step % self.keep_every:
                yield step

    def _remove(self, step: int) -> None:
        """Removes a checkpoint, first of all its name: half of one must never have it."""
        self._path(step).rename(self._path(step, REMOVING))
        shutil.rmtree(self._path(step, REMOVING))

    def _clear_away(self, step: int, error: Exception) -> Exception:
        """Removes what a failed save has left; the exception to raise for it."""
        self._writer = None
        if jax.process_index() == 0:
            shutil.rmtree(self._path(step, SAVING), ignore_errors=True)
        if not _disk_full(error):
            return error
        free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
        wanted = f"{error.strerror}, " if isinstance(error, OSError) else ""
        kept = ", ".join(map(str, self.steps())) or "none"
        return UserError(
            f"The disk of {self.folder} is full ({wanted}{free / 1e6:,.0f} MB free): the checkpoint"
            f" of step {step} could not be written, and nothing of it is left there."
            f"\nCheckpoints that are there and complete: {kept}."
        )

    def _choose(self, step: int | None) -> int | None:
        """The step to restore, agreed between all processes; its files have been read through."""
        chosen = self._choose_here(step) if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            told = multihost_utils.broadcast_one_to_all(np.int32(-1 if chosen is None else chosen))
            chosen = None if told < 0 else int(told)
        return chosen

    def _choose_here(self, step: int | None) -> int | None:
        steps = self.steps()
        if step is not None and step not in steps:
            found = ", ".join(map(str, steps)) or "no checkpoint at all"
            raise UserError(f"{self.folder} holds no checkpoint of step {step}, but {found}")
        damages = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                manifest.verify(self._path(candidate))
            except manifest.Damaged as damage:
                damages.append(f"the checkpoint {self._path(candidate)} is damaged: {damage}")
                continue
            for damage in damages:
                self.warn(f"Passed over: {damage}. Going on from step {candidate} instead.")
            return candidate
        if damages:
            raise UserError("No checkpoint can be restored:\n    " + "\n    ".join(damages))
        return None


def _by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path, e.g. `params.blocks.attention.query.weight`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _entry(name: str) -> str:
    """The entry of the tree's top level that an array belongs to."""
    return name.partition(".")[0]


def _placed(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf's shape with a sharding on real devices.

    Shapes that were traced know the mesh only as an abstract one; the mesh that is set is meant.
    """
    sharding, mesh = leaf.sharding, jax.sharding.get_mesh()
    if not isinstance(getattr(sharding, "mesh", None), Mesh):
        if mesh.empty:
            sharding = SingleDeviceSharding(jax.devices()[0])
        else:
            sharding = NamedSharding(mesh, getattr(sharding, "spec", PartitionSpec()))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a quota, is what lies at the bottom of `error`."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        # Array writers in C++ tell only the text of the operating system's error.
        if "No space left on device" in str(error) or "quota exceeded" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _orbax() -> ModuleType:
    """Orbax, imported where it is needed, and quiet: what goes wrong is said by the exception."""
    import orbax.checkpoint

    logger = logging.getLogger("absl")
    if _not_of_orbax not in logger.filters:
        logger.addFilter(_not_of_orbax)
    return orbax.checkpoint


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
