"""A checkpoint of several processes whose machines share no disk: each sends the pieces it wrote.

Orbax joins the files of all processes where it finds them in one folder. Here each has a folder of
its own, so the pieces are files apart (no OCDBT), and the store's names join them. A process says
that its pieces are there by an object with their sizes and hashes; the first process waits for all
of these, and only then writes the manifest and the index.
"""

import json
import time
from pathlib import Path

from lmjax.files import reason
from lmjax.remote import side_by_side
from lmjax.runs import manifest
from lmjax.runs.array_files import NotWritten
from lmjax.runs.manifest import Files
from lmjax.runs.remote_run import RemoteRun

LOOK = 0.5  # seconds between two looks for another process's pieces
PATIENCE = 1800.0  # seconds that they are waited for


def send_part(run: RemoteRun, step: int, folder: Path, process: int) -> None:
    """Sends what another process than the first one wrote of a checkpoint.

    Args:
        run: the store.
        step: of the checkpoint.
        folder: what Orbax wrote here, in a folder "arrays".
        process: number of this process.

    Raises:
        OSError: something cannot be read or sent.
    """
    described = manifest.describe(folder)
    # What lies beside the arrays, and the shapes in .zarray, the first process has as well.
    pieces = {name: about for name, about in described.items() if _is_piece(name)}
    head = f"checkpoints/{step}"
    side_by_side(lambda name: run.objects.upload(f"{head}/{name}", folder / name), pieces)
    text = json.dumps({"token": run.token, "files": pieces})
    run.objects.write(_part(step, process), text.encode())


def collect_parts(run: RemoteRun, step: int, processes: int) -> Files:
    """Waits until every other process has sent its pieces; their sizes and hashes by name.

    Raises:
        NotWritten: one has not within half an hour.
        OSError: the store cannot be read.
    """
    files: Files = {}
    began = time.monotonic()
    for process in range(1, processes):
        while not (found := _read(run, step, process)):
            if time.monotonic() - began > PATIENCE:
                raise NotWritten(f"process {process} has not sent its pieces")
            time.sleep(LOOK)
        files |= found["files"]
        run.objects.delete(_part(step, process))
    return files


def _read(run: RemoteRun, step: int, process: int) -> dict | None:
    """A process's list of its pieces; None where it has none, or a killed run left it."""
    try:
        found = json.loads(run.objects.read(_part(step, process)) or b"{}")
    except ValueError as error:
        raise NotWritten(f"what process {process} sent is damaged: {reason(error)}") from None
    return found if found.get("token") == run.token else None


def _part(step: int, process: int) -> str:
    return f"checkpoints/{step}/.part-{process}"


def _is_piece(name: str) -> bool:
    _, *inner = name.split("/")
    return len(inner) > 1 and not inner[-1].startswith(".")
