"""Checkpoints: written beside the training, visible only when complete, checked before use.

A checkpoint is a folder named by its step, with the arrays as Orbax writes them and a manifest.
While it is written the folder has another name (`.saving-STEP`), so whatever kills the process, a
folder with a step's name is complete.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from lmjax.config import UserError
from lmjax.files import errors_told, is_full, local_path, reason
from lmjax.launch import is_first, report
from lmjax.runs import manifest
from lmjax.runs.array_files import (
    ArrayWriter,
    NotWritten,
    check_pieces,
    check_written,
    read_arrays,
)
from lmjax.runs.remote_parts import collect_parts, send_part
from lmjax.runs.remote_run import RemoteRun, send_files
from lmjax.runs.trees import by_name, entry_of, is_key, shape_with_sharding

ARRAYS = "arrays"  # what Orbax writes, inside a checkpoint
SAVES = "saves"  # what of a run the processes tell each other
SAVING, REMOVING = ".saving-", ".removing-"  # names of folders that are no checkpoints
BEST = "best"  # in `extra`: the best evaluation so far, {"step": ...} and what chose it
# In `extra`, where `params` are those that are trained alone: the fingerprint of the parameters
# that training began with (`lmjax.interop.folder.parameters_fingerprint`), which have the rest.
BASE = "base"
MARGIN = 1 << 20  # bytes that a checkpoint may take beside its arrays
PATIENCE = 10.0  # seconds that a save is waited for before that is said; then twice as many


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
        self.folder = local_path(folder, "folder").absolute()
        # Of a run in an object store `folder` is a copy on this machine: what is saved there is
        # sent, and what is restored comes from the store.
        self.remote = RemoteRun.of(self.folder.parent)
        remote = self.remote
        # Whether each process has a copy of its own, on another machine perhaps.
        self._apart = remote is not None and jax.process_count() > 1
        self.location = self.folder if remote is None else f"{remote.objects.url}/checkpoints"
        self.keep, self.keep_every = keep, keep_every
        self.asynchronous, self.warn = asynchronous, warn
        self._writer: ArrayWriter | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of all checkpoints that were completed, damaged or not, in order.

        Raises:
          UserError: the folder cannot be read. A link to what is not there is no empty folder.
        """
        if self.remote is not None:
            with errors_told("cannot read the checkpoints"):
                return self.remote.steps()
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError as error:
            if not self.folder.is_symlink():
                return []
            raise UserError(f"cannot read the checkpoints: {reason(error)}") from error
        except OSError as error:
            raise UserError(f"cannot read the checkpoints: {reason(error)}") from error
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def latest(self) -> int | None:
        """The newest step whose files are all there in their lengths; None where there is none."""
        return self.latest_extra().get("step")

    def latest_extra(self) -> dict[str, Any]:
        """JSON values beside the arrays of the newest checkpoint; empty where there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(manifest.Damaged):
                return manifest.read(self._here(step))["extra"]
        return {}

    def check_folder(self) -> None:
        """Makes the folder and sees that something can be written there: now, not after hours.

        Raises:
          UserError: it cannot.
        """
        if is_first():
            with errors_told(f"no checkpoint can be saved in {self.folder}"):
                self._make_folder()
                trial = self.folder / f"{REMOVING}trial"
                trial.mkdir(exist_ok=True)
                trial.rmdir()

    def save(self, step: int, tree: PyTree, extra: Mapping[str, Any]) -> None:
        """Begins to save, and returns when `tree` may be donated; ends the save before this first.

        A checkpoint of the same step is replaced.

        Args:
          step: names the checkpoint.
          tree: arrays on any mesh, typed random keys among them.
          extra: what else it takes to go on, as JSON; `step` is added. The checkpoint of the step
            in its `BEST` stays, as long as the newest checkpoint names it.

        Raises:
          UserError: it cannot be written, or the one before could not. Nothing of that checkpoint
            is left; those before are intact.
        """
        self.wait()
        arrays = by_name(tree)
        extra = json.loads(json.dumps({**extra, "step": step}, allow_nan=False))
        with self._whole_or_not(step):
            self._prepare(step, arrays)
            self._writer.begin(self._path(step, SAVING) / ARRAYS, arrays)
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
        self._thread = threading.Thread(
            target=self._finish, args=(step, shapes, extra), name=f"saving step {step}"
        )
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def check(self) -> None:
        """Raises what `wait` raises, where the last save is known to have failed; never waits."""
        if self._failure is not None:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete; says so where that takes long.

        Raises:
          UserError: it failed.
        """
        began, patience = time.monotonic(), PATIENCE
        while self._thread is not None:
            self._thread.join(patience)
            if not self._thread.is_alive():
                self._thread = None
                break
            seconds = time.monotonic() - began
            self.warn(f"Waiting for {self.location}: {self._thread.name}, {seconds:.0f} s so far")
            patience *= 2
        if self._failure is not None:
            step, error = self._failure
            self._failure = None
            with self._whole_or_not(step):
                raise error

    def close(self) -> None:
        """Completes the last save and lets go of Orbax's threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def restore(
        self, step: int | None, abstract: PyTree | Callable[[dict[str, Any]], PyTree]
    ) -> tuple[PyTree, dict[str, Any]] | None:
        """The arrays of a checkpoint where `abstract` wants them, and the `extra` beside them.

        Args:
          step: which checkpoint; None for the newest undamaged one.
          abstract: a tree of arrays or shapes with shardings, on any mesh; it may leave out whole
            entries of the saved tree's top level, which are then not read. Or what makes such a
            tree of the checkpoint's `extra`.

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
        path = self._here(chosen)
        body = manifest.read(path)
        if callable(abstract):
            abstract = abstract(body["extra"])
        wanted = {name: shape_with_sharding(leaf) for name, leaf in by_name(abstract).items()}
        entries = {entry_of(name) for name in wanted}
        saved = {name: a for name, a in body["arrays"].items() if entry_of(name) in entries}
        if lines := manifest.differences(saved, wanted):
            where = f"The checkpoint {self.location}/{chosen} is of another model or optimizer:"
            raise UserError("\n    ".join((where, *lines)))
        arrays = read_arrays(path / ARRAYS, wanted)
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), body["extra"]

    def _path(self, step: int, prefix: str = "") -> Path:
        return self.folder / f"{prefix}{step}"

    def _here(self, step: int) -> Path:
        """A checkpoint to read, on this machine. UserError where the store cannot be read."""
        path = self._path(step)
        if self.remote is not None:
            with errors_told(f"cannot read {self.location}/{step}"):
                self.remote.fetch(step, path)
        return path

    def _make_folder(self) -> None:
        """Makes the folder where it is missing; OSError where it cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # said of a link to nothing too, which reads better as such
            os.stat(self.folder)
            raise

    def _prepare(self, step: int, arrays: Mapping[str, jax.Array]) -> None:
        """Makes room for a save: removes what a killed process left, looks at the disk."""
        if self._apart and is_first() and step in self.steps():
            self.remote.drop(step)  # before others send theirs
        if is_first() or self._apart:
            self._make_folder()
            for path in self.folder.iterdir():
                if path.name == f"{SAVING}{step}":
                    shutil.rmtree(path)
                elif path.name.startswith((SAVING, REMOVING)):
                    self._clear(path)
            needed = sum(a.nbytes for a in arrays.values() if not is_key(a))
            needed = needed // (jax.process_count() if self._apart else 1) + MARGIN
            # Orbax, once it runs out of space, tells it to the screen in a thousand lines.
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed")
        if self._writer is None:
            self._writer = ArrayWriter(self._apart)

    def _finish(self, step: int, shapes: manifest.Arrays, extra: Mapping[str, Any]) -> None:
        """Waits for Orbax, adds the manifest, gives the checkpoint its name, removes old ones."""
        report(SAVES, "the checkpoint of step", step)
        try:
            self._writer.wait()
            saving = self._path(step, SAVING)
            if is_first():
                elsewhere = self._check(saving, step, shapes)
                manifest.write(saving, shapes, extra, *elsewhere)
                self._give_name(step)
                self._send(step, *elsewhere)
                self._remove_superseded(step, extra.get(BEST, {}).get("step"))
            elif self._apart:
                send_part(self.remote, step, saving, jax.process_index())
                self._clear(saving)
        except BaseException as error:
            self._failure = step, error
        finally:
            report(SAVES, None)

    def _check(self, saving: Path, step: int, shapes: manifest.Arrays) -> list[manifest.Files]:
        """Sees that every piece was written; files of other machines, where these have some."""
        if not self._apart:
            check_written(saving / ARRAYS, shapes)
            return []
        elsewhere = collect_parts(self.remote, step, jax.process_count())
        inside = {name.removeprefix(f"{ARRAYS}/") for name in elsewhere}
        check_pieces(saving / ARRAYS, inside, shapes)
        return [elsewhere]

    def _send(self, step: int, elsewhere: Collection[str] = ()) -> None:
        """Brings a checkpoint to the store, after every line of metrics up to it."""
        if self.remote is not None:
            send_files(self.folder.parent)
            self.remote.add(step, self._path(step), elsewhere)
            for path in self.folder.iterdir():  # the store keeps them; apart, none is whole here
                if path.name.isdecimal() and (self._apart or int(path.name) != step):
                    self._clear(path)

    def _give_name(self, step: int) -> None:
        """Makes a checkpoint of what was saved; one that had the name before goes only then."""
        path, old = self._path(step), self._path(step, REMOVING)
        if replaced := path.exists():
            path.rename(old)
        try:
            self._path(step, SAVING).rename(path)
        except OSError:
            if replaced:
                old.rename(path)
            raise
        if replaced:
            self._clear(old)

    def _remove_superseded(self, newest: int, best: int | None) -> None:
        """Removes what the keep policy gives up; checkpoints after `newest` are not its business.

        The new one is complete by now: where old ones cannot be removed, that is only said.
        """
        try:
            before = [step for step in self.steps() if step <= newest]
        except UserError as error:
            self.warn(f"Old checkpoints stay: {error}")
            return
        for step in before[: -self.keep]:
            if step != best and (self.keep_every is None or step % self.keep_every):
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint, first of all its name: half of one must never have it."""
        try:
            if self.remote is not None:
                self.remote.drop(step)
                return
            self._path(step).rename(self._path(step, REMOVING))
        except OSError as error:
            self.warn(f"An old checkpoint stays: {reason(error)}")
        else:
            self._clear(self._path(step, REMOVING))

    def _clear(self, path: Path) -> None:
        """Removes what is no checkpoint; where that fails it is said, and nothing is lost."""
        try:
            shutil.rmtree(path)
        except OSError as error:
            self.warn(f"{path} cannot be removed: {reason(error)}")

    @contextlib.contextmanager
    def _whole_or_not(self, step: int) -> Iterator[None]:
        """Removes what a save that fails in the block has left, and tells the reason.

        Raises:
          UserError: the system or the disk did not let it be written.
        """
        try:
            yield
        except Exception as error:
            self._writer = None
            if is_first() or self._apart:
                shutil.rmtree(self._path(step, SAVING), ignore_errors=True)
            words = self._failed(step, error)
            if reason(error) is None and not isinstance(error, NotWritten):
                error.add_note(words)
                raise
            raise UserError(words) from error

    def _failed(self, step: int, error: Exception) -> str:
        """Message about a save that failed."""
        why, what = reason(error) or str(error), f"the checkpoint of step {step}"
        if is_full(error):
            free = ""
            with contextlib.suppress(OSError):
                free = f", {shutil.disk_usage(self.folder).free / 1e6:,.0f} MB free"
            words = f"The disk of {self.folder} is full ({why}{free}): {what} could not be written"
        else:
            words = f"{what} could not be written in {self.location} ({why})"
        try:
            kept = ", ".join(map(str, self.steps())) or "none"
        except UserError as unreadable:
            kept = f"not known, {unreadable}"
        return (
            f"{words[0].upper()}{words[1:]}, and nothing of it is left there."
            f"\nCheckpoints that are there and complete: {kept}."
        )

    def _choose(self, step: int | None) -> int | None:
        """The step to restore, agreed between all processes; its files have been read through."""
        chosen = self._choose_here(step) if is_first() else None
        if jax.process_count() > 1:
            told = multihost_utils.broadcast_one_to_all(np.int32(-1 if chosen is None else chosen))
            chosen = None if told < 0 else int(told)
        return chosen

    def _choose_here(self, step: int | None) -> int | None:
        steps = self.steps()
        if step is not None and step not in steps:
            found = ", ".join(map(str, steps)) or "no checkpoint at all"
            raise UserError(f"{self.location} holds no checkpoint of step {step}, but {found}")
        damages = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                manifest.verify(self._here(candidate))
            except manifest.Damaged as damage:
                damages.append(f"the checkpoint {self.location}/{candidate} is damaged: {damage}")
                continue
            for damage in damages:
                self.warn(f"Passed over: {damage}. Going on from step {candidate} instead.")
            return candidate
        if damages:
            raise UserError("No checkpoint can be restored:\n    " + "\n    ".join(damages))
        return None
