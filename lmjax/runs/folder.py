"""The folder of a run: what it holds, and under which names."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.config import UserError, from_json, to_json
from lmjax.data.chat.folder import MAP_FILE, TEMPLATE_FILE, TEMPLATE_FOLDER, TOKENIZER
from lmjax.files import errors_told, write_atomically
from lmjax.remote import local_copy
from lmjax.runs.metrics import NAME as METRICS
from lmjax.runs.metrics import read_metrics
from lmjax.runs.remote_run import RemoteRun

CONFIG = "config.json"  # the experiment
ENVIRONMENT = "environment.json"  # machine and versions
CHECKPOINTS = "checkpoints"  # a folder for each step
PROFILE = "profile"  # traces of steps
REPLIES = "replies"  # JSON lines of replies that were sampled
RESULTS, REPORT = "results.json", "report.html"  # of a finished run
LOCK = ".lock"
GENERATION_FILE = "generation_config.json"  # as a public model's folder has it
FILES = (
    *(CONFIG, ENVIRONMENT, METRICS, RESULTS, REPORT, LOCK),
    *(TEMPLATE_FILE, GENERATION_FILE, MAP_FILE),
)


class RunFolder:
    """Paths and files of one run.

    Attributes:
      path: where they lie on this machine; of a URL that is a copy (`lmjax.remote.local_copy`).
      location: of the folder for the user: the path, or the URL.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """UserError: a URL that cannot be served or read."""
        self.path = local_copy(path, "run folder")
        self.remote = RemoteRun.of(self.path)
        self.location = str(self.path if self.remote is None else self.remote.objects.url)

    @property
    def config(self) -> Path:
        """The experiment as JSON."""
        return self.path / CONFIG

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints by step."""
        return self.path / CHECKPOINTS

    @property
    def tokenizer(self) -> Path:
        """Folder of the run's tokenizer."""
        return self.path / TOKENIZER

    @property
    def profile(self) -> Path:
        """Traces of steps."""
        return self.path / PROFILE

    def trace(self) -> Path | None:
        """The newest trace for https://ui.perfetto.dev, from the folder; None where none is."""
        found = sorted(self.profile.glob("plugins/profile/*/perfetto_trace.json.gz"))
        return found[-1].relative_to(self.path) if found else None

    @property
    def replies(self) -> Path:
        """Folder of the replies that were sampled."""
        return self.path / REPLIES

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / REPORT

    def has_begun(self) -> bool:
        """Returns whether there is a run in the folder. UserError: it cannot be looked at."""
        with errors_told("cannot read the run"):
            return self.config.is_file()

    def experiment(self) -> Any:
        """The experiment of config.json. UserError where there is none or it does not load."""
        with errors_told("cannot read the run"):
            if not self.config.is_file():
                raise UserError(f"{self.location} is not a run folder: {self._missing()}")
            text = self.config.read_text("utf-8")
        try:
            return from_json(text)
        except UserError as error:
            raise UserError(f"{self.config}: {error}") from None

    def _missing(self) -> str:
        """The reason why the path is no run folder."""
        if self.path.is_dir():
            return f"it holds no {CONFIG}"
        if self.path.suffix == ".gguf" and self.path.is_file():
            return (
                "it is a GGUF file, of which one is made by: python -m lmjax.interop"
                f" {self.location} runs/{self.path.stem}"
            )
        return "it is a file" if self.path.is_file() else "there is no such folder"

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in their order; a line cut off by a crash is left out."""
        return read_metrics(self.path)

    def results(self) -> dict[str, Any]:
        """Results of the run (`lmjax.jobs.results`); empty before there are any."""
        return self.read_json(RESULTS)

    def environment(self) -> dict[str, Any]:
        """Machine and versions that the run was last on."""
        return self.read_json(ENVIRONMENT)

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder: whole or not at all, whatever happens meanwhile.

        Raises:
            UserError: it cannot be written.
        """
        write_atomically(self.path / name, text)
        if self.remote is not None and not self.remote.is_ours:
            with errors_told(f"cannot write {self.location}/{name}"):
                self.remote.write(name, text)

    def write_config(self, experiment: Any) -> None:
        """Writes the experiment. UserError: see `write`."""
        self.write(CONFIG, to_json(experiment))

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as indented JSON; null stands for numbers that JSON lacks."""
        text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
        self.write(name, text + "\n")

    def remove(self) -> None:
        """Removes all that a run makes, and the folder if nothing else is in it.

        Raises:
            OSError: something cannot be removed.
        """
        for name in (CHECKPOINTS, TOKENIZER, PROFILE, TEMPLATE_FOLDER):
            shutil.rmtree(self.path / name, ignore_errors=True)
        unfinished = self.path.glob(".*.partial")  # which a kill has left
        for path in (*(self.path / name for name in FILES), *unfinished):
            path.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def read_json(self, name: str) -> dict[str, Any]:
        """JSON object in a file of the folder; empty where there is none.

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


def _finite(value: Any) -> Any:
    """JSON values with None in place of infinity and of what is no number."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
