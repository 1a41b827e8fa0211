"""Weights of an ONNX file, in float32 or in 8 bits, and products with them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from lmjax.interop.huggingface import whole
from lmjax.interop.onnx_graph import Graph, Value

OnnxWeights = Literal["float32", "int8"]
Matrix = Callable[[], np.ndarray]  # gives [in, out], where it is not known yet
LARGEST = 127  # of an int8 with its opposite


@dataclasses.dataclass(frozen=True)
class MatrixWeights(abc.ABC):
    """Base: how weights are kept in a graph and multiplied with."""

    graph: Graph

    @abc.abstractmethod
    def rows(self, x: Value, title: str, matrix: Matrix) -> Value:
        """x [..., in] . matrix [in, out]."""

    @abc.abstractmethod
    def lookup(self, ids: Value, title: str, table: Matrix) -> Value:
        """Rows of a table [rows, width] in float32."""

    @abc.abstractmethod
    def with_rows(self, x: Value, title: str, table: Matrix) -> Value:
        """Products of x [batch, seq, width] with each row of a table that `lookup` reads too."""


@dataclasses.dataclass(frozen=True)
class FloatWeights(MatrixWeights):
    """Weights in float32."""

    def rows(self, x: Value, title: str, matrix: Matrix) -> Value:
        """See `MatrixWeights`."""
        return self.graph.op("MatMul", x, self.graph.weight(title, matrix))

    def lookup(self, ids: Value, title: str, table: Matrix) -> Value:
        """See `MatrixWeights`."""
        return self.graph.op("Gather", self.graph.weight(title, table), ids)

    def with_rows(self, x: Value, title: str, table: Matrix) -> Value:
        """See `MatrixWeights`. Gemm reads the table as it lies; a transposed one is a copy."""
        rows = self.graph.weight(title, table)
        width = self.graph.tensors.get(title).dims[1]
        out = self.graph.op("Gemm", x.reshape(-1, width), rows, transB=1)
        shape = self.graph.op("Concat", x.size(0), x.size(1), rows.size(0), axis=0)
        return self.graph.op("Reshape", out, shape)


@dataclasses.dataclass(frozen=True)
class Int8Weights(MatrixWeights):
    """Weights in int8 with a scale for each output, or row of a table; inputs in uint8.

    The scale of the inputs is that of their largest number in each call, so what a row gives
    depends a little on those beside it.
    """

    def rows(self, x: Value, title: str, matrix: Matrix) -> Value:
        """See `MatrixWeights`."""
        codes, scales = self._kept(title, matrix, axis=0)
        return self._product(x, codes, scales)

    def lookup(self, ids: Value, title: str, table: Matrix) -> Value:
        """See `MatrixWeights`."""
        codes, scales = self._kept(title, table, axis=1)
        rows = self.graph.op("Gather", codes, ids).cast(np.float32)
        return rows * self.graph.op("Gather", scales, ids).expand(-1)

    def with_rows(self, x: Value, title: str, table: Matrix) -> Value:
        """See `MatrixWeights`."""
        codes, scales = self._kept(title, table, axis=1)
        return self._product(x, codes.transpose(1, 0), scales)

    def _kept(self, title: str, matrix: Matrix, axis: int) -> tuple[Value, Value]:
        """Codes of a matrix, and the scales of what lies along `axis`."""
        names = f"{title}.codes", f"{title}.scales"
        if names[0] not in self.graph.tensors:
            for name, array in zip(names, int8_codes(matrix(), axis)):
                self.graph.tensors.add(name, array)
        return self.graph.weight(names[0]), self.graph.weight(names[1])

    def _product(self, x: Value, codes: Value, scales: Value) -> Value:
        dtypes = np.uint8, np.float32, np.uint8
        steps, scale, zero = self.graph.op("DynamicQuantizeLinear", x, outputs=3, dtype=dtypes)
        sums = self.graph.op("MatMulInteger", steps, codes, zero, dtype=np.int32)
        return sums.cast(np.float32) * (scale * scales)


def int8_codes(matrix: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes from -127 to 127 and float32 scales: what lies along `axis` is about codes x scale."""
    largest = np.abs(matrix).max(axis=axis, keepdims=True)
    scales = np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)
    codes = np.clip(np.rint(matrix / scales), -LARGEST, LARGEST).astype(np.int8)
    return codes, scales.squeeze(axis)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of a model, or of the part of it that lies under a path.

    Attributes:
      graph: that they become weights of.
      paths: all leaves by dotted path; those of blocks are stacked.
      product: how rows are multiplied with matrices.
      prefix: path of the part.
      layer: number of the block.
      expert: number of the expert, of weights of several stacked.
      read: is called with the bytes of each parameter that was read.
    """

    graph: Graph
    paths: dict[str, Any]
    product: MatrixWeights
    prefix: str = ""
    layer: int | None = None
    expert: int | None = None
    read: Callable[[int], None] = lambda size: None

    def part(self, name: str) -> Weights:
        """Those of a part of this part."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}.")

    def block(self, layer: int) -> Weights:
        """Those of a block of this stack."""
        return dataclasses.replace(self.part("blocks"), layer=layer)

    def of_expert(self, number: int) -> Weights:
        """Those of an expert of these stacked ones."""
        return dataclasses.replace(self, expert=number)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.paths

    def title(self, name: str) -> str:
        """The name of a parameter in the file."""
        path = self.prefix + name
        for name, number in (("blocks", self.layer), ("experts", self.expert)):
            if number is not None:
                path = path.replace(f"{name}.", f"{name}.{number}.", 1)
        return path

    def array(self, name: str) -> np.ndarray:
        """A parameter in float32, of a block or an expert its own."""
        leaf = self.paths[self.prefix + name]
        index = tuple(number for number in (self.layer, self.expert) if number is not None)
        array = whole(leaf, index, "float32")
        self.read(array.nbytes)
        return array

    def weight(self, name: str) -> Value:
        """A parameter as it is."""
        return self.graph.weight(self.title(name), self.array(name))


PRODUCTS = {"float32": FloatWeights, "int8": Int8Weights}
