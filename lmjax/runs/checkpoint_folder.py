"""The folder of a run's checkpoints: their names, which of them are there, which of them stay.

A checkpoint is a folder named by its step, with the arrays as Orbax writes them and a manifest.
While it is written the folder has another name (`.saving-STEP`), so whatever kills the process, a
folder with a step's name is complete.
"""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmjax.config import UserError
from lmjax.files import errors_told, local_path, reason
from lmjax.launch import is_first
from lmjax.runs import manifest
from lmjax.runs.remote_run import RemoteRun, send_files

SAVING, REMOVING = ".saving-", ".removing-"  # names of folders that are no checkpoints
MARGIN = 1 << 20  # bytes that a checkpoint may take beside its arrays


def say(message: str) -> None:
    """Prints a warning on stderr."""
    print(message, file=sys.stderr, flush=True)


class CheckpointFolder:
    """The checkpoints of a run, on this machine or in an object store.

    Attributes:
      folder: the path; of a run in an object store that of a copy on this machine: what is saved
        there is sent, and what is read comes from the store.
      remote: the store; None where there is none.
      apart: whether each process has a copy of its own, on another machine perhaps.
      location: the folder as messages name it.
      warn: is told what a person should know, as that a damaged checkpoint was passed over.
    """

    def __init__(self, folder: Path | str, warn: Callable[[str], None] = say) -> None:
        """Nothing is read or written yet."""
        self.folder = local_path(folder, "folder").absolute()
        self.remote = remote = RemoteRun.of(self.folder.parent)
        self.apart = remote is not None and jax.process_count() > 1
        self.location = self.folder if remote is None else f"{remote.objects.url}/checkpoints"
        self.warn = warn

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
                return manifest.read(self.fetched(step))["extra"]
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

    def path_of(self, step: int, prefix: str = "") -> Path:
        """Path of a checkpoint, or of one that is being saved or removed."""
        return self.folder / f"{prefix}{step}"

    def fetched(self, step: int) -> Path:
        """Path of a checkpoint to read, which is on this machine now.

        Raises:
          UserError: the store cannot be read.
        """
        path = self.path_of(step)
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

    def prepare(self, step: int, size: int) -> None:
        """Makes room for a save: removes what a killed process left, looks at the disk.

        Args:
          step: that is saved.
          size: bytes of the arrays, those of all processes.

        Raises:
          OSError: there is no room, or the folder cannot be written.
        """
        if self.apart and is_first() and step in self.steps():
            self.remote.drop(step)  # before others send theirs
        if is_first() or self.apart:
            self._make_folder()
            for path in self.folder.iterdir():
                if path.name == f"{SAVING}{step}":
                    shutil.rmtree(path)
                elif path.name.startswith((SAVING, REMOVING)):
                    self.clear(path)
            needed = size // (jax.process_count() if self.apart else 1) + MARGIN
            # Orbax, once it runs out of space, tells it to the screen in a thousand lines.
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed")

    def complete(self, step: int, elsewhere: Collection[str] = ()) -> None:
        """Makes a checkpoint of what was saved, here and in the store.

        Args:
          step: that was saved.
          elsewhere: files of it that other machines have sent.

        Raises:
          OSError: it cannot be.
        """
        self._give_name(step)
        self._send(step, elsewhere)

    def _send(self, step: int, elsewhere: Collection[str]) -> None:
        """Brings a checkpoint to the store, after every line of metrics up to it."""
        if self.remote is not None:
            send_files(self.folder.parent)
            self.remote.add(step, self.path_of(step), elsewhere)
            for path in self.folder.iterdir():  # the store keeps them; apart, none is whole here
                if path.name.isdecimal() and (self.apart or int(path.name) != step):
                    self.clear(path)

    def _give_name(self, step: int) -> None:
        """Makes a checkpoint of what was saved; one that had the name before goes only then."""
        path, old = self.path_of(step), self.path_of(step, REMOVING)
        if replaced := path.exists():
            path.rename(old)
        try:
            self.path_of(step, SAVING).rename(path)
        except OSError:
            if replaced:
                old.rename(path)
            raise
        if replaced:
            self.clear(old)

    def remove_superseded(
        self, newest: int, best: int | None, keep: int, keep_every: int | None
    ) -> None:
        """Removes old checkpoints, those after `newest` excepted.

        The new one is complete by now: where old ones cannot be removed, that is only said.

        Args:
          newest: step of the new one.
          best: step of one that stays; None: of none.
          keep: how many of the newest stay.
          keep_every: those of multiples of this step stay; None: of none.
        """
        try:
            before = [step for step in self.steps() if step <= newest]
        except UserError as error:
            self.warn(f"Old checkpoints stay: {error}")
            return
        for step in before[:-keep]:
            if step != best and (keep_every is None or step % keep_every):
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint, first of all its name: half of one must never have it."""
        try:
            if self.remote is not None:
                self.remote.drop(step)
                return
            self.path_of(step).rename(self.path_of(step, REMOVING))
        except OSError as error:
            self.warn(f"An old checkpoint stays: {reason(error)}")
        else:
            self.clear(self.path_of(step, REMOVING))

    def clear(self, path: Path) -> None:
        """Removes what is no checkpoint; where that fails it is said, and nothing is lost."""
        try:
            shutil.rmtree(path)
        except OSError as error:
            self.warn(f"{path} cannot be removed: {reason(error)}")

    def choose(self, step: int | None) -> int | None:
        """The step to restore, agreed between all processes; its files have been read through.

        Args:
          step: that is wanted; None: the newest undamaged one.

        Returns:
          None where there is no checkpoint.

        Raises:
          UserError: every candidate is damaged, or there is none of that step.
        """
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
                manifest.verify(self.fetched(candidate))
            except manifest.Damaged as damage:
                damages.append(f"the checkpoint {self.location}/{candidate} is damaged: {damage}")
                continue
            for damage in damages:
                self.warn(f"Passed over: {damage}. Going on from step {candidate} instead.")
            return candidate
        if damages:
            raise UserError("No checkpoint can be restored:\n    " + "\n    ".join(damages))
        return None
