"""Checkpoints: written beside the training, visible only when complete, checked before use."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from lmjax.config import UserError
from lmjax.files import is_full, reason
from lmjax.launch import is_first, report
from lmjax.runs import manifest
from lmjax.runs.array_files import (
    ArrayWriter,
    NotWritten,
    check_pieces,
    check_written,
    read_arrays,
)
from lmjax.runs.checkpoint_folder import SAVING, CheckpointFolder, say
from lmjax.runs.remote_parts import collect_parts, send_part
from lmjax.runs.trees import by_name, entry_of, is_key, shape_with_sharding

ARRAYS = "arrays"  # what Orbax writes, inside a checkpoint
SAVES = "saves"  # what of a run the processes tell each other
BEST = "best"  # in `extra`: the best evaluation so far, {"step": ...} and what chose it
# In `extra`, where `params` are those that are trained alone: the fingerprint of the parameters
# that training began with (`lmjax.interop.folder.parameters_fingerprint`), which have the rest.
BASE = "base"
PATIENCE = 10.0  # seconds that a save is waited for before that is said; then twice as many


class Checkpointer(CheckpointFolder):
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
        warn: Callable[[str], None] = say,
    ):
        """Nothing is read or written yet.

        Args:
          folder: where the checkpoints are, or will be.
          keep: how many of the newest stay, at least one.
          keep_every: checkpoints of multiples of this step stay for ever; None: none do.
          asynchronous: write while training goes on.
          warn: see `CheckpointFolder`.
        """
        if keep < 1:
            raise UserError(f"keep={keep}: at least the newest checkpoint has to stay")
        super().__init__(folder, warn)
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self._writer: ArrayWriter | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
            self.prepare(step, sum(a.nbytes for a in arrays.values() if not is_key(a)))
            if self._writer is None:
                self._writer = ArrayWriter(self.apart)
            self._writer.begin(self.path_of(step, SAVING) / ARRAYS, arrays)
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
        chosen = self.choose(step)
        if chosen is None:
            return None
        path = self.fetched(chosen)
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

    def _finish(self, step: int, shapes: manifest.Arrays, extra: Mapping[str, Any]) -> None:
        """Waits for Orbax, adds the manifest, gives the checkpoint its name, removes old ones."""
        report(SAVES, "the checkpoint of step", step)
        try:
            self._writer.wait()
            saving = self.path_of(step, SAVING)
            if is_first():
                elsewhere = self._check(saving, step, shapes)
                manifest.write(saving, shapes, extra, *elsewhere)
                self.complete(step, *elsewhere)
                best = extra.get(BEST, {}).get("step")
                self.remove_superseded(step, best, self.keep, self.keep_every)
            elif self.apart:
                send_part(self.remote, step, saving, jax.process_index())
                self.clear(saving)
        except BaseException as error:
            self._failure = step, error
        finally:
            report(SAVES, None)

    def _check(self, saving: Path, step: int, shapes: manifest.Arrays) -> list[manifest.Files]:
        """Sees that every piece was written; files of other machines, where these have some."""
        if not self.apart:
            check_written(saving / ARRAYS, shapes)
            return []
        elsewhere = collect_parts(self.remote, step, jax.process_count())
        inside = {name.removeprefix(f"{ARRAYS}/") for name in elsewhere}
        check_pieces(saving / ARRAYS, inside, shapes)
        return [elsewhere]

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
            if is_first() or self.apart:
                shutil.rmtree(self.path_of(step, SAVING), ignore_errors=True)
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
