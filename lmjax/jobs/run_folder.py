"""The folder of a run: what lies where, who may write in it, and whether a run may go on in it."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from lmjax.config import UserError, from_json, to_json
from lmjax.config.disk import errors_told, local_path, lock, reason, write_atomically
from lmjax.interop.kept_files import remove_kept
from lmjax.training.checkpoints import Checkpointer
from lmjax.training.metrics import read_metrics

# How the same work is done, with the same bits.
RESOURCES = ("data.cache", "data.workers", "data.tokenize_workers", "data.on_change")
# How the same numbers are computed, up to rounding.
ROUNDING = (
    "mesh",
    "zero",
    "accumulation",
    "model.remat",
    "model.unroll",
    "model.attention.implementation",
)
# Settings that may change when a run goes on, with all below them; all others make it another run.
FREE = ("output", "steps", "evaluation", "checkpoint", "log", *RESOURCES, *ROUNDING)

# Where the text and a tokenizer's folder lie: what is in them is compared by `data.prepare`.
PLACES = re.compile(
    r"data\.train\.\d+\.(source|evaluation)\.(path(\.\d+)?|data_dir)|data\.tokenizer(\.\w+)*\.path"
)

LOCK = ".lock"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class RunFolder:
    """Paths and files of one run.

    config.json (the experiment), environment.json (machine and versions), metrics.jsonl,
    checkpoints/, tokenizer/, results.json and report.html (at the end).
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = local_path(path, "run folder")

    @property
    def config(self) -> Path:
        """The experiment as JSON."""
        return self.path / "config.json"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints by step."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """What is needed to turn text into the model's tokens."""
        return self.path / "tokenizer"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    def experiment(self) -> Any:
        """The experiment of config.json. UserError where there is none or it does not load."""
        with errors_told("cannot read the run"):
            if not self.config.is_file():
                raise UserError(f"{self.path} is not a run folder: it holds no config.json")
            text = self.config.read_text("utf-8")
        try:
            return from_json(text)
        except UserError as error:
            raise UserError(f"{self.config}: {error}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in their order; a line cut off by a crash is left out."""
        return read_metrics(self.path)

    def results(self) -> dict[str, Any]:
        """What the finished run came to; empty before its end."""
        return self.read_json("results.json")

    def environment(self) -> dict[str, Any]:
        """Machine and versions that the run was last on."""
        return self.read_json("environment.json")

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder: whole or not at all, whatever happens meanwhile.

        Raises:
            UserError: it cannot be written.
        """
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as indented JSON."""
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def remove(self) -> None:
        """Removes all that a run makes, and the folder if nothing else is in it.

        Raises:
            OSError: something cannot be removed.
        """
        for name in ("checkpoints", "tokenizer"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (
            "config.json",
            "environment.json",
            "metrics.jsonl",
            "results.json",
            "report.html",
            LOCK,
        ):
            (self.path / name).unlink(missing_ok=True)
        remove_kept(self.path)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def read_json(self, name: str) -> dict[str, Any]:
        """What a file of the folder holds; empty where there is none.

        Raises:
            UserError: it cannot be read, or is none of ours.
        """
        path = self.path / name
        with errors_told("cannot read the run"):
            try:
                found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            except ValueError:
                found = None
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged: delete it, and it is made again")
        return found


@contextmanager
def occupy(experiment: Any, warn: Callable[[str], None] = _say) -> Iterator[RunFolder]:
    """The run folder `experiment.output`, made or continued, and nobody else's meanwhile.

    A folder that this call has made is removed again when a UserError ends it before there is a
    checkpoint: nothing half-written is left behind.

    Args:
        experiment: a config with an `output`.
        warn: is told where nothing can keep other processes out.

    Raises:
        UserError: the folder holds something else, cannot be used, another process is writing in
            it, or it is the run of an experiment that differs in more than `FREE` and `PLACES`.
    """
    folder = RunFolder(experiment.output)
    if jax.process_index() > 0:  # the first process locks, checks and writes for all of them
        _wait_for_all()
        yield folder
        return
    with errors_told(f"cannot write in output={folder.path}"):
        fresh = not folder.config.is_file()
        # A kill may have left hidden files before there was a config.
        found = os.listdir(folder.path) if folder.path.is_dir() else []
    if fresh and any(not name.startswith(".") for name in found):
        raise UserError(
            f"output={experiment.output} exists and is not a run folder (it holds no config.json): "
            "choose another output"
        )
    with _locked(folder.path, warn):
        if fresh:
            folder.write("config.json", to_json(experiment))
        else:
            check_continues(folder, experiment)
        _wait_for_all()
        try:
            yield folder
        except UserError:
            with suppress(UserError, OSError):  # of a disk that cannot be used, nothing is removed
                if fresh and not Checkpointer(folder.checkpoints).steps():
                    folder.remove()
            raise


def _wait_for_all() -> None:
    """Returns when every process of the run has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")


def check_continues(folder: RunFolder, experiment: Any) -> None:
    """Raises UserError where the folder holds the run of another experiment: shows what differs."""
    differing = [
        f"    {name}: {before} in the folder, {now} now"
        for name, before, now in differences(folder.experiment(), experiment)
        if not is_below(name, FREE) and not PLACES.fullmatch(name)
    ]
    if differing:
        few = differing[:12] + [f"    and {len(differing) - 12} more"] * (len(differing) > 12)
        raise UserError(
            f"{folder.path} holds another run; settings that differ:\n"
            + "\n".join(few)
            + f"\nChoose another folder (output=...), delete {folder.path} to start anew, or give "
            "the same settings to go on."
        )


def differences(before: Any, now: Any) -> list[tuple[str, str, str]]:
    """Name and both values (as JSON, or "absent") of each setting in which two configs differ."""
    old, new = (flatten(json.loads(to_json(config))) for config in (before, now))
    return [
        (name, _shown(old, name), _shown(new, name))
        for name in sorted(old.keys() | new.keys())
        if _shown(old, name) != _shown(new, name)
    ]


def is_below(name: str, settings: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the settings or inside one."""
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested JSON as one dictionary from dotted path to leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat = {}
    for key, child in items:
        name = f"{path}.{key}" if path else str(key)
        if isinstance(child, dict | list) and child:
            flat |= flatten(child, name)
        else:
            flat[name] = child
    return flat


def _shown(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


@contextmanager
def _locked(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Holds the folder's lock; the system frees it when the process ends, however it ends."""
    with errors_told(f"cannot write in output={path}"):
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a+")
    try:
        try:
            if not lock(file):
                warn(
                    f"The file system of {path} knows no locks, so nothing keeps a second process "
                    "from training there at the same time: see that there is none."
                )
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {path}: wait for it, or choose another output"
            ) from error
        except OSError as error:
            raise UserError(f"cannot lock output={path}: {reason(error)}") from error
        yield
    finally:
        with suppress(OSError):  # there is nothing in it
            file.close()
