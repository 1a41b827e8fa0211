"""Settings of a model whose weights are kept in few bits, and how its layers come to hold them."""

from __future__ import annotations

from flax import nnx

from lmjax.config import UserError, config
from lmjax.models.embedding import Embedding
from lmjax.models.experts import ExpertMatrix
from lmjax.models.integer_products import ActivationCode
from lmjax.models.linear import LinearLayer
from lmjax.models.lora import fits
from lmjax.models.number_codes import Int8
from lmjax.models.quantized import QuantizedWeight, WeightForm
from lmjax.models.weight_codes import WeightCode


@config
class Quantization:
    """Weights in few bits: those of dense layers of the blocks, experts' too, and the tables."""

    weights: WeightCode = Int8()  # how weights of dense layers are kept; blocks run along inputs
    # dense layers of the blocks by their last names or dotted paths, such as query,
    # feed_forward.*; * is all of them. What chooses experts stays in float32
    layers: tuple[str, ...] = ("*",)
    # how the token table and the head are kept, blocks along each row; none: in float32
    tables: WeightCode | None = None
    # how inputs of these layers are rounded, for products of integers; none: they are not
    activations: ActivationCode | None = None
    # weights stay in float32 and are rounded where they are used, so that training learns what the
    # rounded model does (Jacob et al. 2018, arXiv:1712.05877)
    aware: bool = False

    def validate(self) -> None:
        """Raises UserError where no layer is named, or products of integers cannot be had."""
        if not self.layers:
            raise UserError("quantization.layers is empty: give (*,) for all dense layers")
        if self.activations is not None:
            self.activations.check(self.weights)
            if self.aware:
                raise UserError("quantization.aware=true: inputs are not rounded; activations=none")

    def keeps(self, path: str) -> bool:
        """Returns whether the layer with this path in a block, as attention.query, is kept so."""
        return any(fits(f"blocks.{path}", pattern) for pattern in self.layers)


def weighted_layers(block: nnx.Module) -> dict[str, LinearLayer | ExpertMatrix]:
    """Layers of a block by dotted path that may be kept in few bits: all but adapters, routers."""
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(block)
        if isinstance(module, LinearLayer | ExpertMatrix)
    }
    names = sorted(path for path in layers if not {"adapter", "router"} & set(path.split(".")))
    return {path: layers[path] for path in names}


def quantize_block(block: nnx.Module, quantization: Quantization | None) -> None:
    """Makes layers of a block hold their weights as the setting says.

    Raises:
      UserError: a pattern is for no layer of the block.
    """
    if quantization is None:
        return
    layers = weighted_layers(block)
    for pattern in quantization.layers:
        if not any(fits(f"blocks.{path}", pattern) for path in layers):
            raise UserError(
                f"quantization.layers: {pattern!r} is for no dense layer of the blocks, which have"
                f" {', '.join(layers)}"
            )
    for path, layer in layers.items():
        if not quantization.keeps(path):
            continue
        stack = () if isinstance(layer, LinearLayer) else layer.stack
        if stack and (quantization.aware or quantization.activations is not None):
            raise UserError(
                f"quantization: {path} has experts, whose weights can be kept in few bits, and no"
                " more: set aware=false and activations=none, or name other layers"
            )
        axes = layer.inputs, layer.outputs, quantization.weights, layer.layout, stack
        form = WeightForm(*axes)
        if quantization.aware:
            layer.rounding = form
        else:
            layer.weight = QuantizedWeight(layer.weight[...], form)
        if quantization.activations is not None:
            quantization.activations.prepare(layer)


def quantize_table(table: Embedding, quantization: Quantization | None) -> None:
    """Makes a token table or a head hold its rows as the setting says."""
    code = None if quantization is None or quantization.aware else quantization.tables
    if code is not None:
        form = WeightForm(table.width, (), code, table.layout, table.rows)
        table.table = QuantizedWeight(table.table[...], form)
