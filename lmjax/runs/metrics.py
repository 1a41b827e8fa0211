"""metrics.jsonl, one JSON object a line, and its copies for TensorBoard and Weights & Biases.

The file is the record of a run: a line is in it, on disk as far as this process is concerned, when
`write` returns, and on resume it is cut back to the checkpoint, so that every step stands in it
once. JSON knows no infinity and no NaN: they are written as the strings "inf", "-inf" and "nan",
and `read_metrics` gives them back as floats.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.config import UserError
from lmjax.files import errors_told, local_path, write_atomically
from lmjax.launch import is_first
from lmjax.remote import local_copy

NAME = "metrics.jsonl"
NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class MetricsWriter:
    """Writes the records of a run; on every process but the first it does nothing.

    A record is a flat mapping with `step` (int) and `split` ("train" or the name of a held-out
    set), numbers, and now and then a string.
    """

    def __init__(
        self,
        folder: Path | str,
        tensorboard: bool = False,
        wandb: Mapping[str, Any] | None = None,
    ):
        """Opens the file for appending.

        Args:
          folder: the run folder; made where it is missing.
          tensorboard: also write event files into `folder`/tensorboard.
          wandb: keyword arguments of `wandb.init` (project, name, ...); None: not used.

        Raises:
          UserError: what writes the copies is not installed (the message names the extra), or the
            file cannot be written.
        """
        folder = local_path(folder, "folder")
        self.path = folder / NAME
        self._file = self._tensorboard = self._wandb = None
        if not is_first():
            return
        if tensorboard:
            self._tensorboard = _EventFile(folder / "tensorboard")
        if wandb is not None:
            self._wandb = _wandb_run(folder, wandb)
        with errors_told(f"cannot write in {self.path.parent}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; it is in the file when this returns.

        Raises:
          UserError: it cannot be written.
        """
        if self._file is None:
            return
        line = json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False)
        left = memoryview(f"{line}\n".encode())
        with errors_told(f"cannot write {self.path}"):
            while left:  # a disk that fills up takes a part of it first
                left = left[self._file.write(left) :]
        step, split = record["step"], record.get("split", "train")
        numbers = {
            f"{split}/{name}": float(value)
            for name, value in record.items()
            if name not in ("step", "split") and not isinstance(value, str | bool | None)
        }
        if self._tensorboard is not None:
            self._tensorboard.write(numbers, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def truncate_after(self, step: int) -> None:
        """Removes all records of later steps, and what a crash left of a line.

        The file is replaced as a whole: a crash here leaves either the old one or the new one.
        """
        if self._file is None:
            return
        with errors_told(f"cannot write {self.path}"):
            self._file.close()
        kept = [line for line, record in _records(self.path) if record["step"] <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))
        self._open()

    def close(self) -> None:
        """Closes the file and the copies."""
        for sink, finish in (
            (self._file, "close"),
            (self._tensorboard, "close"),
            (self._wandb, "finish"),
        ):
            if sink is not None:
                with errors_told(f"cannot write {self.path}"):
                    getattr(sink, finish)()
        self._file = self._tensorboard = self._wandb = None

    def _open(self) -> None:
        # Without a buffer: what could not be written does not come up again when it is closed.
        with errors_told(f"cannot write {self.path}"):
            self._file = self.path.open("ab", buffering=0)


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """The records of a run folder in their order; half a line at the end is left out.

    Raises:
      UserError: the file cannot be read, or has a line inside it that is no record.
    """
    path = local_copy(folder, "folder") / NAME
    with errors_told(f"cannot read {path}"):
        is_there = path.is_file()
    return [
        {
            name: NOT_FINITE.get(value, value) if isinstance(value, str) else value
            for name, value in record.items()
        }
        for _, record in (_records(path) if is_there else ())
    ]


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line with the record in it. The last line counts only when it is complete."""
    with errors_told(f"cannot read {path}"):
        *lines, _ = path.read_text("utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number}: not a record of metrics (a JSON object with a step):"
                f" {line[:80]!r}"
            ) from None
        records.append((line, record))
    return records


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; arrays of one number as that number."""
    if value is None or isinstance(value, str | bool | int):
        return value
    number = value.item() if hasattr(value, "item") else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    return number


class _EventFile:
    """The copy for TensorBoard, written before `write` returns.

    tensorboardX's own writer hands events to a thread, and waits for it for ever when it has died
    of a full disk.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        except ImportError:
            raise UserError(
                "tensorboard=True needs tensorboardX: pip install 'lmjax[tensorboard]'"
            ) from None
        self.folder, self._event, self._scalar = folder, event_pb2.Event, summary.scalar
        with errors_told(f"cannot write in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = event_file_writer.EventsWriter(str(folder / "events"))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Appends the numbers of a step."""
        now = time.time()
        with errors_told(f"cannot write in {self.folder}"):
            for name, value in numbers.items():
                summary = self._scalar(name, value)
                self._file.write_event(self._event(wall_time=now, step=step, summary=summary))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with errors_told(f"cannot write in {self.folder}"):
            self._file.close()


def _wandb_run(folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("Weights & Biases needs wandb: pip install 'lmjax[wandb]'") from None
    run = wandb.init(dir=str(folder), resume="allow", **settings)
    # Steps of several splits come interleaved, and again after a resume.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
