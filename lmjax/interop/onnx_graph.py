"""Graphs of ONNX operators, put together node by node (https://onnx.ai/onnx/operators).

graph = Graph(Tensors())
x = graph.input("x", np.float32, ("batch", 4))
y = graph.op("MatMul", x, graph.weight("w", w)) + 1.0
graph.output("y", y, ("batch", 3))
onnx.save(graph.model(), "y.onnx")
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lmjax.config import UserError

OPSET, IR_VERSION = 20, 9  # the first with Gelu; what runtimes of its time read
PAGE = 4096  # bytes: a runtime maps tensors that begin at such places into its memory
INLINE = 1024  # bytes of a tensor that stays in the graph
Sizes = Sequence[int | str]  # a name stands for a size that each run has its own of


def library() -> Any:
    """The package `onnx`; UserError where it is missing."""
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX files need the package onnx: pip install 'lmjax[onnx]'") from None
    return onnx


class Tensors:
    """Weights of one graph or of several, in them or in a file beside them, in the order of use."""

    def __init__(self, path: Path | None = None, location: str | None = None):
        """Args: path of the file beside the graphs and its name there; None: in the graphs."""
        self.location = location
        self._file = None if path is None else path.open("wb")
        self._known: dict[str, Any] = {}

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds an array under a name of its own."""
        self._known[name] = self._made(name, array)

    def get(self, name: str) -> Any:
        """The `TensorProto` of what was added under this name."""
        return self._known[name]

    def _made(self, name: str, array: np.ndarray) -> Any:
        onnx = library()
        array = np.ascontiguousarray(array)
        if self._file is None or array.nbytes <= INLINE:
            return onnx.numpy_helper.from_array(array, name)
        start = self._file.tell()
        self._file.write(bytes(-start % PAGE))
        start += -start % PAGE
        self._file.write(memoryview(array).cast("B"))
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        where = {"location": self.location, "offset": start, "length": array.nbytes}
        for key, value in where.items():
            proto.external_data.add(key=key, value=str(value))
        return proto


@dataclasses.dataclass(frozen=True)
class Value:
    """Output of a node. Numbers and arrays beside it take its dtype.

    Attributes:
      graph: that it is of.
      name: in the graph.
      dtype: of its numbers.
    """

    graph: Graph
    name: str
    dtype: np.dtype

    def _with(self, kind: str, other: Any, dtype: Any = None) -> Value:
        return self.graph.op(kind, self, self._like(other), dtype=dtype)

    def _like(self, other: Any) -> Value:
        if isinstance(other, Value):
            return other
        return self.graph.constant(np.asarray(other, self.dtype))

    def __add__(self, other: Any) -> Value:
        return self._with("Add", other)

    def __mul__(self, other: Any) -> Value:
        return self._with("Mul", other)

    __radd__, __rmul__ = __add__, __mul__

    def __sub__(self, other: Any) -> Value:
        return self._with("Sub", other)

    def __truediv__(self, other: Any) -> Value:
        return self._with("Div", other)

    def __le__(self, other: Any) -> Value:
        return self._with("LessOrEqual", other, bool)

    def __lt__(self, other: Any) -> Value:
        return self._with("Less", other, bool)

    def __and__(self, other: Any) -> Value:
        return self._with("And", other)

    def cast(self, dtype: Any) -> Value:
        """The numbers in another dtype."""
        to = library().helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.graph.op("Cast", self, to=to, dtype=dtype)

    def reshape(self, *sizes: int) -> Value:
        """The numbers in another shape: 0 keeps the size in its place, -1 takes what is left."""
        return self.graph.op("Reshape", self, self.graph.constant(np.array(sizes, np.int64)))

    def transpose(self, *axes: int) -> Value:
        """The axes in another order."""
        return self.graph.op("Transpose", self, perm=axes)

    def expand(self, *axes: int) -> Value:
        """With new axes of size 1 at these places."""
        return self.graph.op("Unsqueeze", self, self.graph.constant(np.array(axes, np.int64)))

    def size(self, axis: int) -> Value:
        """The size of an axis, as an array of one number."""
        return self.graph.op("Shape", self, start=axis, end=axis + 1, dtype=np.int64)

    def rest(self, first: Value, axis: int) -> Value:
        """The part from `first` on along an axis."""
        constant = self.graph.constant
        end, along = np.array([np.iinfo(np.int64).max]), np.array([axis])
        return self.graph.op("Slice", self, first, constant(end), constant(along))


class Graph:
    """Nodes in the order of their computation, inputs and outputs."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._constants: dict[tuple, Value] = {}
        self._scope: list[str] = []

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Puts a name before those of the nodes that are made meanwhile."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, dtype: Any, sizes: Sizes) -> Value:
        """A new input of the graph."""
        self._inputs.append(self._info(name, dtype, sizes))
        return Value(self, name, np.dtype(dtype))

    def output(self, name: str, value: Value, sizes: Sizes) -> None:
        """Makes a value an output of the graph under a name."""
        self._nodes.append(library().helper.make_node("Identity", [value.name], [name], name=name))
        self._outputs.append(self._info(name, value.dtype, sizes))

    def weight(
        self, name: str, array: np.ndarray | Callable[[], np.ndarray] | None = None
    ) -> Value:
        """A parameter of the model; without an array it is in `tensors` already.

        A function that gives the array is called where it is not.
        """
        if name not in self.tensors:
            self.tensors.add(name, array() if callable(array) else array)
        proto = self._initializers[name] = self.tensors.get(name)
        return Value(self, name, library().helper.tensor_dtype_to_np_dtype(proto.data_type))

    def constant(self, array: np.ndarray | np.generic) -> Value:
        """Numbers that are part of the computation; equal ones are one value."""
        array = np.asarray(array)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers[name] = library().numpy_helper.from_array(array, name)
            self._constants[key] = Value(self, name, array.dtype)
        return self._constants[key]

    def op(
        self, kind: str, *inputs: Value | None, dtype: Any = None, outputs: int = 1, **attributes
    ) -> Any:
        """The output of an operator.

        Args:
          kind: its name in ONNX.
          inputs: None for one that is left out.
          dtype: of the output; None: that of the first input. Of several outputs, one for each.
          outputs: how many there are.
          attributes: of the operator.

        Returns:
          A value, or a tuple of them where there are several outputs.
        """
        scope = "/".join(self._scope)
        name = f"{scope}/{kind}_{len(self._nodes)}"
        names = [name] if outputs == 1 else [f"{name}.{n}" for n in range(outputs)]
        given = ["" if value is None else value.name for value in inputs]
        self._nodes.append(library().helper.make_node(kind, given, names, name=name, **attributes))
        dtypes = dtype if outputs > 1 and dtype is not None else [dtype] * outputs
        found = [
            Value(self, name, np.dtype(inputs[0].dtype if one is None else one))
            for name, one in zip(names, dtypes, strict=True)
        ]
        return found[0] if outputs == 1 else tuple(found)

    def model(self, name: str = "model", notes: dict[str, str] | None = None) -> Any:
        """The graph as a `ModelProto`, with notes for who opens it."""
        helper = library().helper
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(
            graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="lmjax"
        )
        if notes:
            helper.set_model_props(model, notes)
        return model

    def _info(self, name: str, dtype: Any, sizes: Sizes) -> Any:
        helper = library().helper
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, kind, list(sizes))


def cannot(name: str, part: Any) -> UserError:
    """An error that names a part of a model which no function here writes."""
    return UserError(f"{name}={type(part).__name__}: an ONNX file cannot have this part")
