"""The command that makes the weights of a model small."""

from __future__ import annotations

import functools
from typing import Literal

import jax

from lmjax.compression.calibration_text import calibration_rows
from lmjax.compression.methods import Method, Quantizer
from lmjax.config import UserError, config
from lmjax.console import make_console
from lmjax.interop.convert import new_folder_anywhere, read, tell_written, write_model, write_run
from lmjax.interop.packed_writer import write_packed
from lmjax.interop.tensor_files import LARGEST_FILE
from lmjax.launch import import_modules
from lmjax.models import (
    NF4,
    DynamicInt8,
    Float8,
    Int4,
    Int8,
    Quantization,
    StaticInt8,
    merge_adapters,
    with_quantization,
)
from lmjax.models.weight_codes import WeightCode
from lmjax.parallel import Mesh
from lmjax.remote import check_path, local_copy
from lmjax.runs.folder import RunFolder
from lmjax.runs.trained_model import TrainedModel

Weights = Literal["int8", "int4", "nf4", "fp8"]


@config
class Quantise:
    """The same model with weights in few bits, in a run folder of its own."""

    source: str | None = None  # a run folder, or a model folder
    destination: str | None = None  # is made: it must not exist, or be empty
    weights: Weights = "int4"  # how weights of dense layers are kept
    # inputs that share a scale; none: all of an output, as products of integers need it
    group: int | None = 64
    symmetric: bool = True  # of integers: zero is 0; false: each group has its own
    # the token table and the head, groups along each row; none: they stay in float32
    tables: Weights | None = "int8"
    layers: tuple[str, ...] = ("*",)  # which dense layers, by last names or dotted paths
    # inputs in 8 bits too, for weights=int8 group=none: scales of each token, or calibrated ones
    activations: Literal["dynamic", "static"] | None = None
    # nearest; gptq (arXiv:2210.17323); awq (arXiv:2306.00978); smoothquant (arXiv:2211.10438)
    method: Method = "nearest"
    calibration: str | None = None  # a text file, by whose inputs the other methods choose
    rows: int = 64  # of the text, that are read
    length: int = 256  # tokens of a row
    damping: float = 0.01  # of gptq: share of the mean that is added to the diagonal
    by_activation: bool = True  # of gptq: inputs are rounded in the order of their size
    alpha: float = 0.5  # of smoothquant: share of the inputs' range that weights take over
    # a run folder, or one of transformers' formats, in which tables are floats
    to: Literal["run", "gptq", "awq", "compressed-tensors"] = "run"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of floats in such a format
    step: int | None = None  # which checkpoint of a run; none: the best one, or else the newest
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        check_path(self.source or "", "source")
        check_path(self.destination or "", "destination", write=True)
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise UserError(f"group={self.group}: must be an even number from 2 on, or none")
        for name in ("rows", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha}: must be from 0 to 1")
        if self.damping <= 0:
            raise UserError(f"damping={self.damping}: must be above 0")
        if self.activations is not None and (self.weights, self.group) != ("int8", None):
            raise UserError(
                f"activations={self.activations}: products of integers need weights=int8 and"
                " group=none"
            )
        self.quantization()

    def quantization(self) -> Quantization:
        """The setting of the model that it becomes."""
        kinds = {None: None, "dynamic": DynamicInt8(), "static": StaticInt8()}
        return Quantization(
            weights=self.code(self.weights, self.group),
            layers=self.layers,
            tables=None if self.tables is None else self.code(self.tables, self.group),
            activations=kinds[self.activations],
        )

    def code(self, name: Weights, group: int | None) -> WeightCode:
        """The way to keep weights that a name stands for."""
        if name == "nf4":
            return NF4(block=group, double=False)
        if name == "fp8":
            return Float8(block=group)
        kind = Int8 if name == "int8" else Int4
        return kind(block=group, symmetric=self.symmetric, scales="float16")

    def run(self) -> None:
        """Reads the model, makes it small and writes it.

        Raises:
          UserError: no folders are named, or one cannot be read or written; the method cannot
            serve the model.
        """
        if self.source is None or self.destination is None:
            raise UserError(
                "Which folders? For instance: python -m lmjax.compression quantise"
                " runs/quickstart models/quickstart-int4"
            )
        import_modules(self.imports)
        console = make_console()
        with jax.set_mesh(self.mesh.build()):
            source = local_copy(self.source, "source")
            with new_folder_anywhere(self.destination, self.to == "run") as folder:
                trained, notes = read(source, self.step, console)
                rows = calibration_rows(
                    self.calibration, trained.tokenizer, self.source, self.rows, self.length
                )
                params, model = merge_adapters(trained.params, trained.config)
                params, model = with_quantization(params, model, None)
                make = Quantizer(
                    self.quantization(),
                    self.method,
                    rows,
                    self.damping,
                    self.by_activation,
                    self.alpha,
                    tell=lambda text: console.print(text, soft_wrap=True),
                )
                params, model = make(model, params)
                small = TrainedModel(model, params, trained.tokenizer, trained.objective)
                if self.to == "run":
                    write_run(RunFolder(folder), small, source, console)
                else:
                    write = functools.partial(write_packed, kind=self.to)
                    how = self.dtype, LARGEST_FILE, console, write
                    notes += write_model(folder, small, source, *how)
            tell_written(console, self.destination, notes)
