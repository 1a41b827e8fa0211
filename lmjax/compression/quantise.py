"""The command that makes the weights of a model small."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import ClassVar, Literal

from rich.console import Console

from lmjax.compression.command import Compression, Rows
from lmjax.compression.methods import Method, Quantizer, Tell
from lmjax.config import UserError, config
from lmjax.interop.convert import write_model
from lmjax.interop.packed_writer import write_packed
from lmjax.interop.tensor_files import LARGEST_FILE
from lmjax.models import (
    NF4,
    DynamicInt8,
    Float8,
    Int4,
    Int8,
    Quantization,
    StaticInt8,
    TransformerConfig,
)
from lmjax.models.weight_codes import WeightCode
from lmjax.runs.trained_model import TrainedModel

Weights = Literal["int8", "int4", "nf4", "fp8"]


@config
class Quantise(Compression):
    """The same model with weights in few bits, in a run folder of its own."""

    example: ClassVar[str] = "quantise runs/quickstart runs/quickstart-int4"

    weights: Weights = "int4"  # how weights of dense layers are kept
    # inputs that share a scale; none: all of an output, as products of integers need it
    group: int | None = 64
    symmetric: bool = True  # of integers: zero is 0; false: each group has its own
    # the token table and the head, groups along each row; none: they stay in float32
    tables: Weights | None = "int8"
    layers: tuple[str, ...] = ("*",)  # which dense layers, by last names or dotted paths
    # inputs in 8 bits too, for weights=int8 group=none: scales of each token, or calibrated ones
    activations: Literal["dynamic", "static"] | None = None
    # nearest; gptq (arXiv:2210.17323); awq (arXiv:2306.00978); smoothquant (arXiv:2211.10438).
    # All but nearest read the calibration text
    method: Method = "nearest"
    by_activation: bool = True  # of gptq: inputs are rounded in the order of their size
    alpha: float = 0.5  # of smoothquant: share of the inputs' range that weights take over
    # a run folder, or one of transformers' formats, in which tables are floats
    to: Literal["run", "gptq", "awq", "compressed-tensors"] = "run"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of floats in such a format

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        super().validate()
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise UserError(f"group={self.group}: must be an even number from 2 on, or none")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha}: must be from 0 to 1")
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

    @property
    def to_run(self) -> bool:
        """See `Compression.to_run`."""
        return self.to == "run"

    def change(
        self, params: dict, model: TransformerConfig, rows: Rows | None, tell: Tell
    ) -> tuple[dict, TransformerConfig]:
        """See `Compression.change`."""
        make = Quantizer(
            self.quantization(),
            self.method,
            rows,
            self.damping,
            self.by_activation,
            self.alpha,
            tell=tell,
        )
        return make(model, params)

    def write(self, folder: Path, small: TrainedModel, source: Path, console: Console) -> list[str]:
        """See `Compression.write`."""
        if self.to_run:
            return super().write(folder, small, source, console)
        write = functools.partial(write_packed, kind=self.to)
        return write_model(folder, small, source, self.dtype, LARGEST_FILE, console, write)
