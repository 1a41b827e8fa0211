"""The folder that a run began with: where it is, and whether it is still what it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lmjax.config import UserError
from lmjax.data.cache import cache_folder
from lmjax.data.documents import digest
from lmjax.data.hashes import FileHashes
from lmjax.interop import adapter_folder, huggingface
from lmjax.remote import is_url, local_copy
from lmjax.runs import manifest
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import CHECKPOINTS, RunFolder
from lmjax.runs.trained_model import best_step

WEIGHTS = (".safetensors", ".bin", ".json")  # suffixes of a public folder's weights and settings
# Ends of the settings among them that parameters depend on.
OF_WEIGHTS = ("/config.json", "/adapter_config.json", ".index.json")


def beginning_folder(job: Any, folder: str | os.PathLike) -> str:
    """Path of the folder that a run began with, from where this process works.

    Where a relative path leads nowhere from here, it is followed from where the run was started:
    the folder in which the run's own relative `output` lies.

    Args:
      job: settings of the run.
      folder: path of the run.
    """
    given, output = Path(job.begin_with), Path(job.output)
    if is_url(job.begin_with) or is_url(folder) or given.is_absolute() or given.exists():
        return job.begin_with
    parts = Path(folder).absolute().parts
    if output.is_absolute() or parts[-len(output.parts) :] != output.parts:
        return job.begin_with
    beside = Path(*parts[: -len(output.parts)]) / given
    return str(beside) if beside.exists() else job.begin_with


def parameters_fingerprint(path: str | os.PathLike) -> str:
    """A name for the parameters in a folder, from its files, whatever the folder is called.

    Args:
      path: as in `read_params`. Of a checkpoint the manifest is read alone, which has the hashes of
        the other files.

    Raises:
      UserError: it is no folder of a model.
    """
    files = list(map(str, files_of_parameters(path)))
    manifests = [file for file in files if file.endswith(f"/{manifest.NAME}")]
    weights = [f for f in files if not f.endswith(".json") or f.endswith(OF_WEIGHTS)]
    return digest(*_hashes()(manifests or weights))


def check_beginning(path: str, fingerprint: str, run: str | os.PathLike) -> None:
    """Raises UserError where a folder has not the parameters that a run began with.

    Args:
      path: of that folder, the run's `begin_with`.
      fingerprint: `parameters_fingerprint` as it was then.
      run: whose checkpoints hold the trained parameters alone.
    """
    where = f"{run} holds what was trained alone, and the rest is in begin_with={path}"
    try:
        found = parameters_fingerprint(path)
    except UserError as error:
        raise UserError(
            f"{where}, which cannot be read: {error}\nPut it back there, or give its new path in"
            " the run's config.json"
        ) from None
    if found != fingerprint:
        raise UserError(
            f"{where}, whose parameters have changed since: its fingerprint was {fingerprint}, and"
            f" is {found}. Put those back that the run began with"
        )


def files_of_parameters(path: str | os.PathLike) -> list[Path]:
    """Files that say what the parameters in a folder are: its weights and settings.

    Args:
      path: as in `read_params`. Of adapters the files of their model are among them.

    Raises:
      UserError: it is no folder of a model.
    """
    folder = local_copy(path, "folder")
    if adapter_folder.is_adapter_folder(folder):
        below = files_of_parameters(adapter_folder.base_folder(folder))
        return [*sorted(folder.glob("adapter_*")), *below]
    if huggingface.is_model_folder(folder):
        return sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    run = RunFolder(folder)
    checkpointer = Checkpointer(run.checkpoints)
    step = best_step(checkpointer) or checkpointer.latest()
    if step is None:
        run.experiment()  # tells what is wrong with a folder that is none of a run
        raise UserError(f"{folder} holds no checkpoint yet: nothing has been saved there")
    saved = (run.path / CHECKPOINTS / str(step)).rglob("*")
    return [run.config, *sorted(file for file in saved if file.is_file())]


def _hashes() -> FileHashes:
    """Hashes of files, which the usual cache keeps: many gigabytes are read once."""
    try:
        return FileHashes(cache_folder("") / "hashes")
    except UserError:  # there is no home
        return FileHashes()
