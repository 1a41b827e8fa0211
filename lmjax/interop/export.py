"""Models in the forms of other programs: llama.cpp's GGUF, ONNX, StableHLO."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lmjax.config import UserError
from lmjax.console import ByteBar, make_console
from lmjax.data.chat.folder import DEFAULT, read_templates
from lmjax.files import local_path
from lmjax.interop import gguf_file, onnx_file, onnx_graph, stablehlo_folder
from lmjax.interop.convert import read, tell_written
from lmjax.interop.gguf_source import as_folder
from lmjax.interop.new_folder import new_folder
from lmjax.interop.prefix_notes import by_ranks, left_to_right
from lmjax.interop.tensor_files import Report
from lmjax.remote import local_copy
from lmjax.runs.trained_model import TrainedModel

# Writes a model of a folder to a path, reports the bytes, and gives notes for the user.
Write = Callable[[Path, Path, TrainedModel, Report], list[str]]


def convert_to_gguf(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    weights: gguf_file.GGUFType = "f16",
    step: int | None = None,
    console: Console | None = None,
) -> None:
    """Writes a model with its tokenizer and chat template as one GGUF file, for llama.cpp.

    Args:
      source: a run folder, a model folder, one of adapters, which are merged, or a GGUF file.
      destination: of the file, which must not exist.
      weights: see `gguf_file.write`.
      step: see `convert`.
      console: see `convert`.

    Raises:
      UserError: see `gguf_file.write`; or the destination exists.
    """
    gguf_file.library()

    def write(path: Path, folder: Path, trained: TrainedModel, report: Report) -> list[str]:
        model = trained.config, trained.params, trained.tokenizer
        template = read_templates(folder).get(DEFAULT)
        text = None if template is None else template.source
        return gguf_file.write(path, *model, weights, text, report) + left_to_right(trained)

    _export(source, destination, step, console, write)


def convert_to_onnx(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    weights: onnx_file.OnnxWeights = "float32",
    step: int | None = None,
    console: Console | None = None,
) -> None:
    """Writes a model as ONNX, with a key-value cache where it continues texts.

    Args:
      source: see `convert_to_gguf`.
      destination: of the file, which must not exist; see `onnx_file.write`.
      weights: see `onnx_file.write`.
      step: see `convert`.
      console: see `convert`.

    Raises:
      UserError: see `onnx_file.write`; or the destination exists.
    """
    onnx_graph.library()

    def write(path: Path, folder: Path, trained: TrainedModel, report: Report) -> list[str]:
        model, prefix = (trained.config, trained.params), trained.reads_prefix
        notes = onnx_file.write(path, *model, weights, report, prefix=prefix)
        return notes + by_ranks(trained)

    _export(source, destination, step, console, write)


def convert_to_stablehlo(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    step: int | None = None,
    console: Console | None = None,
) -> None:
    """Writes a model as StableHLO programs and its weights.

    Args:
      source: see `convert_to_gguf`.
      destination: a folder, which must not exist or be empty.
      step: see `convert`.
      console: see `convert`.

    Raises:
      UserError: see `stablehlo_folder.write`; or the destination holds something.
    """
    console = make_console() if console is None else console
    with new_folder(local_path(destination, "destination")) as folder:
        with as_folder(local_copy(source, "source")) as known:
            trained, notes = read(known, step, console)
        with ByteBar("writing", console) as report:
            model, prefix = (trained.config, trained.params), trained.reads_prefix
            notes += stablehlo_folder.write(folder, *model, report, prefix=prefix)
        notes += by_ranks(trained)
    tell_written(console, destination, notes)


def _export(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    step: int | None,
    console: Console | None,
    write: Write,
) -> None:
    """Reads a model and writes it to a path where nothing is yet."""
    path = local_path(destination, "destination")
    console = make_console() if console is None else console
    if path.exists():
        raise UserError(f"{path} exists already: choose another file")
    with as_folder(local_copy(source, "source")) as folder:
        trained, notes = read(folder, step, console)
        path.parent.mkdir(parents=True, exist_ok=True)
        with ByteBar("writing", console) as report:
            notes += write(path, folder, trained, report)
    tell_written(console, destination, notes)
