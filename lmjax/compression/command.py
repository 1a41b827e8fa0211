"""Part that the commands which make a smaller model of another have in common."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console

from lmjax.compression.calibration_text import calibration_rows
from lmjax.compression.methods import Tell
from lmjax.config import UserError, config
from lmjax.console import make_console
from lmjax.interop.convert import read, tell_written, write_run
from lmjax.interop.gguf_source import as_folder
from lmjax.interop.new_folder import new_folder_anywhere
from lmjax.launch import import_modules
from lmjax.models import TransformerConfig, merge_adapters, with_quantization
from lmjax.parallel import Mesh
from lmjax.remote import check_path, local_copy
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import TrainedModel

Rows = Int[np.ndarray, "rows length"]


@config
class Compression(abc.ABC):
    """Base of the commands that read a model, make it smaller and write it."""

    example: ClassVar[str]  # words of a command line, for whoever gives none

    source: str | None = None  # a run folder, a model folder, or a GGUF file
    destination: str | None = None  # is made: it must not exist, or be empty
    calibration: str | None = None  # a text file, for methods that choose by the model's inputs
    rows: int = 64  # of the text, that are read
    length: int = 256  # tokens of a row
    damping: float = 0.01  # of gptq and sparsegpt: share of the mean added to the diagonal
    step: int | None = None  # which checkpoint of a run; none: the best one, or else the newest
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        check_path(self.source or "", "source")
        check_path(self.destination or "", "destination", write=True)
        for name in ("rows", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.damping <= 0:
            raise UserError(f"damping={self.damping}: must be above 0")

    @property
    def to_run(self) -> bool:
        """Returns whether a run folder is written."""
        return True

    def run(self) -> None:
        """Reads the model, makes it smaller and writes it.

        Raises:
          UserError: no folders are named, or one cannot be read or written; the model cannot be
            made smaller so.
        """
        if self.source is None or self.destination is None:
            command = f"python -m lmjax.compression {self.example}"
            raise UserError(f"Which folders? For instance: {command}")
        self.check_asked()
        import_modules(self.imports)
        console = make_console()
        with (
            jax.set_mesh(self.mesh.build()),
            as_folder(local_copy(self.source, "source")) as source,
            new_folder_anywhere(self.destination, self.to_run) as folder,
        ):
            trained, notes = read(source, self.step, console)
            notes += self.write(folder, self.made_smaller(trained, console), source, console)
        tell_written(console, self.destination, notes)

    def check_asked(self) -> None:
        """Raises UserError where nothing is asked for."""
        return

    def made_smaller(self, trained: TrainedModel, console: Console) -> TrainedModel:
        """The smaller model; its adapters are merged first, and few bits made floats."""

        def tell(text: str) -> None:
            console.print(text, soft_wrap=True)

        how = trained.tokenizer, self.source, self.rows, self.length
        rows = calibration_rows(self.calibration, *how)
        params, model = merge_adapters(trained.params, trained.config)
        params, model = with_quantization(params, model, None)
        params, model = self.change(params, model, rows, tell)
        return TrainedModel(model, params, trained.tokenizer, trained.objective)

    @abc.abstractmethod
    def change(
        self, params: dict, model: TransformerConfig, rows: Rows | None, tell: Tell
    ) -> tuple[dict, TransformerConfig]:
        """The smaller model.

        Args:
          params: float32, without adapters.
          model: its config.
          rows: of the calibration text; None where none is named.
          tell: is told what happens.

        Raises:
          UserError: the settings do not fit the model.
        """

    def write(self, folder: Path, small: TrainedModel, source: Path, console: Console) -> list[str]:
        """Writes the smaller model; gives notes for the user."""
        write_run(RunFolder(folder), small, source, console, self.source)
        return []
