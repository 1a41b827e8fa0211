"""Weights of dense layers with their outputs first, as a CPU reads them for a few rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from lmjax.models.linear import LinearLayer
from lmjax.models.parameters import abstract
from lmjax.models.transformer import TransformerConfig
from lmjax.parallel import Layout

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class DenseAxes:
    """Numbers of axes of a dense layer's weight; those of layers before them are not counted."""

    inputs: int
    outputs: int

    def outputs_first(self, weight: AnyArray) -> AnyArray:
        """[..., *inputs, *outputs] as [..., *outputs, *inputs]."""
        return self._turned(weight, self.inputs)

    def inputs_first(self, weight: AnyArray) -> AnyArray:
        """The weight of `outputs_first` as it was."""
        return self._turned(weight, self.outputs)

    def _turned(self, weight: AnyArray, count: int) -> AnyArray:
        """The weight with its first `count` axes behind the others."""
        begin = weight.ndim - self.inputs - self.outputs
        behind = begin + count
        axes = *range(begin), *range(behind, weight.ndim), *range(begin, behind)
        return weight.transpose(axes)


def decoding_layout(config: TransformerConfig, layout: Layout) -> Layout:
    """The layout with the outputs of dense weights first, where products of a few rows are faster.

    They are on a single CPU in float32; weights in few bits lie so anyway.
    """
    few_bits = config.quantization is not None or (config.lora is not None and config.lora.base)
    one_cpu = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size == 1
    first = one_cpu and config.dtype == "float32" and not few_bits
    return dataclasses.replace(layout, outputs_first=first)


@functools.lru_cache(maxsize=32)
def dense_axes(config: TransformerConfig) -> dict[str, DenseAxes]:
    """The weights of dense layers by dotted path, of a model that keeps none in few bits."""
    model = nnx.merge(*abstract(config, Layout(rules=())))
    return {
        ".".join(map(str, (*path, "weight"))): DenseAxes(len(layer.inputs), len(layer.outputs))
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, LinearLayer)
    }
