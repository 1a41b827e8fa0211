"""Maps between the tensors of public model files and ours: data, used in both directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lmjax.models.transformer import TransformerConfig

Shape = tuple[int, ...]
Settings = Mapping[str, Any]  # a config.json
# Names of activations in config.json -> ours; the first of several is written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# What fused projections are fused from.
ATTENTION = ("blocks.attention.query", "blocks.attention.key", "blocks.attention.value")


def activation_name(config: TransformerConfig, names: Mapping[str, str] = ACTIVATIONS) -> str:
    """The first of these names for the config's activation; any of them where none is for it."""
    own = config.feed_forward.activation
    return next((theirs for theirs, ours in names.items() if ours == own), next(iter(names)))


@dataclasses.dataclass(frozen=True)
class Transform:
    """Layout of a tensor of a model folder in our parameters, which it may fuse."""

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        """The shape of their tensor, from those of our parts."""
        raise TypeError(f"{type(self).__name__} does not say how its tensor is shaped")

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        """Cuts their tensor into ours, less the zeros behind a vocabulary."""
        raise TypeError(f"{type(self).__name__} cannot be read")

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        """Joins ours into their tensor."""
        raise TypeError(f"{type(self).__name__} cannot be written")


@dataclasses.dataclass(frozen=True)
class Matrix(Transform):
    """The weight of a dense layer, (out, in) there and [*inputs, *outputs] here.

    Several parts (query, key and value) stand one after another along their output axis.
    """

    inputs: int = 1  # how many of our axes are inputs: 2 after the heads
    transposed: bool = True  # False: (in, out), the layout of GPT's Conv1D

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        rows = math.prod(parts[0][: self.inputs])
        columns = sum(math.prod(part[self.inputs :]) for part in parts)
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        matrix = tensor.T if self.transposed else tensor
        widths = [math.prod(part[self.inputs :]) for part in parts]
        cuts = np.split(matrix, np.cumsum(widths)[:-1], axis=1)
        return [cut.reshape(part) for cut, part in zip(cuts, parts)]

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        rows = math.prod(parts[0].shape[: self.inputs])
        matrix = np.concatenate([part.reshape(rows, -1) for part in parts], axis=1)
        return matrix.T if self.transposed else matrix


@dataclasses.dataclass(frozen=True)
class Grouped(Transform):
    """Query, key and value fused group by group: its queries, its key, its value.

    A group is a key head with the query heads that read it: all heads are in one for multi-query
    attention (Falcon-7B), each head is its own without grouping (BLOOM). Weights are (out, in)
    there and [in, heads, head_dim] here, biases flat there and [heads, head_dim] here.
    """

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        rows = sum(math.prod(part[-2:]) for part in parts)
        return (rows, *parts[0][:-2])

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        groups, head_dim = parts[1][-2:]
        fused = tensor.reshape(groups, -1, head_dim, *tensor.shape[1:])
        heads = fused.shape[1] - 2
        cuts = np.split(fused, [heads, heads + 1], axis=1)
        flat = [cut.reshape(-1, head_dim, *tensor.shape[1:]) for cut in cuts]
        return [np.moveaxis(cut, (0, 1), (-2, -1)) for cut in flat]

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        groups = parts[1].shape[-2]
        flat = [np.moveaxis(part, (-2, -1), (0, 1)) for part in parts]
        cuts = [part.reshape(groups, -1, *part.shape[1:]) for part in flat]
        fused = np.concatenate(cuts, axis=1)
        return fused.reshape(-1, *fused.shape[3:])


@dataclasses.dataclass(frozen=True)
class Vector(Transform):
    """Biases and norm scales: flat there, our parts one after another."""

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        return (sum(math.prod(part) for part in parts),)

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        cuts = np.split(tensor, np.cumsum([math.prod(part) for part in parts])[:-1])
        return [cut.reshape(part) for cut, part in zip(cuts, parts)]

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        return np.concatenate([part.reshape(-1) for part in parts])


@dataclasses.dataclass(frozen=True)
class RowTable(Transform):
    """A table with a row a position, or whatever else is the same here."""

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        return parts[0]

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        return [tensor]

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        return parts[0]


@dataclasses.dataclass(frozen=True)
class HeadsFirst(Transform):
    """An output projection: [out, heads, head_dim] there and [heads, head_dim, out] here."""

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        heads, head_dim, out = parts[0]
        return (out, heads, head_dim)

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        return [np.moveaxis(tensor, 0, -1)]

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        return np.moveaxis(parts[0], -1, 0)


@dataclasses.dataclass(frozen=True)
class VocabularyTable(Transform):
    """A row or a number for each token; who reads it adds zeros, so that any mesh can cut it."""

    def shape(self, parts: Sequence[Shape], config: TransformerConfig) -> Shape:
        return (config.vocab_size, *parts[0][1:])

    def read(self, tensor: np.ndarray, parts: Sequence[Shape]) -> list[np.ndarray]:
        return [tensor]

    def write(self, parts: Sequence[np.ndarray], config: TransformerConfig) -> np.ndarray:
        return parts[0][: config.vocab_size]


@dataclasses.dataclass(frozen=True)
class Name:
    """One line of a map.

    Attributes:
      theirs: name of the tensor in the file; `{layer}` stands for the number of the block,
        `{layer_from_1}` for one more, `{end}` for the number after the last of those, `{expert}`
        for the number of an expert of the block.
      ours: dotted paths of the parameters in it. Where a config has none of them (biases, an
        untied head), the file has no such tensor.
      transform: what lies between.
      when: says which configs the line is for; None: all.
    """

    theirs: str
    ours: tuple[str, ...]
    transform: Transform
    when: Callable[[TransformerConfig], bool] | None = None


def dense(
    theirs: str, *ours: str, transform: Transform, bias: Transform | None = None
) -> tuple[Name, Name]:
    """The weight and the bias of a dense layer, fused from our layers `ours`."""
    return (
        Name(f"{theirs}.weight", tuple(f"{layer}.weight" for layer in ours), transform),
        Name(f"{theirs}.bias", tuple(f"{layer}.bias" for layer in ours), bias or Vector()),
    )


def norm(theirs: str, ours: str) -> tuple[Name, Name]:
    """The scale and the bias of a norm."""
    return (
        Name(f"{theirs}.weight", (f"{ours}.scale",), Vector()),
        Name(f"{theirs}.bias", (f"{ours}.bias",), Vector()),
    )
