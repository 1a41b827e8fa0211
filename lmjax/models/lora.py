"""LoRA: low-rank adapters of the blocks' dense layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.linear import Builder, LinearLayer, dropout
from lmjax.models.quantized import Axes, QuantizedWeight, WeightForm
from lmjax.models.weight_codes import WeightCode

# What is folded into a block's key for its adapters: the block splits the key itself.
KEY = 0x10CA
OUTPUT_HEAD = "head"  # among `LoRA.layers`: the table of the words' head, where it is not tied


@config
class LoRA:
    """Adapters B A of low rank beside dense layers W: y = W x + scale B A x (arXiv:2106.09685)."""

    rank: int = 8  # columns of A, rows of B
    alpha: float = 16.0  # B A x is multiplied by alpha / rank
    rank_stabilised: bool = False  # by alpha / sqrt(rank) instead (arXiv:2312.03732)
    dropout: float = 0.0  # of the adapters' input, in training
    # dense layers of the blocks by their last names or dotted paths, such as query,
    # cross_attention.value, feed_forward.*; * is all of them. head is the head of words, where it
    # is a table of its own: its adapter drops nothing, and each step makes the table anew with it
    layers: tuple[str, ...] = ("query", "value")
    # how the weights of all dense layers of the blocks are kept, which are then trained no more
    # (QLoRA): NF4, ScaledInt8; none: in float32
    base: WeightCode | None = None

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant, or where no layer is named."""
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}: must be 1 or more")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha={self.alpha}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout}: must be 0 or more, and below 1")
        if not self.layers:
            raise UserError("lora.layers is empty: give (*,) for all dense layers of the blocks")

    @property
    def scale(self) -> float:
        """Factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def adapts_head(self) -> bool:
        """Returns whether the head of words is adapted."""
        return OUTPUT_HEAD in self.layers

    def adapts(self, layer: str) -> bool:
        """Returns whether the layer with this path in a block, as attention.query, is adapted."""
        return any(fits(f"blocks.{layer}", pattern) for pattern in self.layers)


def fits(path: str, pattern: str) -> bool:
    """Returns whether a pattern, in which * is anything, matches a dotted path or an end of it."""
    return any(fnmatch.fnmatchcase(path, start + pattern) for start in ("", "*."))


class Adapter(nnx.Module):
    """scale B A x, in float32 whatever the layer beside it computes in.

    A is drawn as `peft` draws it, uniformly within 1 / sqrt(inputs); B is zero, so that training
    begins with the model as it was.
    """

    def __init__(self, lora: LoRA, inputs: Axes, outputs: Axes, builder: Builder):
        builder = dataclasses.replace(builder, dtype="float32")
        inner = ((None, lora.rank),)
        self.scale, self.dropout = lora.scale, lora.dropout
        self.a = builder.linear(inputs, inner, bias=False, kind=_uniform)
        self.b = builder.linear(inner, outputs, bias=False, kind=jax.nn.initializers.zeros)
        self.key = nnx.data(None)  # for dropout; see `give_keys`

    def __call__(self, x: Float[Array, "batch seq *inputs"]) -> Float[Array, "batch seq *outputs"]:
        def product(x):
            return self.b(self.a(dropout(x.astype(jnp.float32), self.dropout, self.key)))

        # Backward computes A x again: of what it reads, only x is kept, which the layer has anyway.
        return self.scale * jax.checkpoint(product, prevent_cse=False)(x)

    def delta(self) -> Float[Array, "*inputs_and_outputs"]:
        """Matrix that the adapter adds to the layer's weight, cut over the mesh as that is."""
        layout, axes = self.a.layout, self.a.inputs + self.b.outputs
        spec = layout.spec(*(name for name, _ in axes), shape=tuple(size for _, size in axes))
        a, b = self.a.float_weight(), self.b.float_weight()
        return self.scale * jnp.tensordot(
            a, layout.reshard(b, *(None,) * b.ndim), 1, precision="highest", out_sharding=spec
        )


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype) -> jax.Array:
    """Kaiming's uniform with a = sqrt(5), for a matrix whose last axis alone is its outputs."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def dense_layers(block: nnx.Module) -> dict[str, LinearLayer]:
    """The dense layers of a block by dotted path, less those of adapters."""
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(block)
        if isinstance(module, LinearLayer) and "adapter" not in path
    }
    return dict(sorted(layers.items()))


def add_adapters(block: nnx.Module, lora: LoRA | None, builder: Builder) -> None:
    """Gives the block's layers that `lora` names their adapters.

    They are drawn after everything else in the block, whose parameters are the same without them.
    """
    if lora is None:
        return
    for path, layer in dense_layers(block).items():
        if lora.base is not None:
            form = WeightForm(layer.inputs, layer.outputs, lora.base, layer.layout)
            layer.weight = QuantizedWeight(layer.float_weight(), form)
        if lora.adapts(path):
            layer.adapter = Adapter(lora, layer.inputs, layer.outputs, builder)


def check_layers(lora: LoRA | None, block: nnx.Module) -> None:
    """Raises UserError where a pattern of `lora` is for no layer of the block, but for the head."""
    there = dense_layers(block)
    for pattern in lora.layers if lora is not None else ():
        if pattern != OUTPUT_HEAD and not any(fits(f"blocks.{path}", pattern) for path in there):
            raise UserError(
                f"lora.layers: {pattern!r} is for no dense layer of the blocks, which have"
                f" {', '.join(there)}"
            )


def give_keys(block: nnx.Module, key: PRNGKeyArray | None) -> None:
    """Gives the adapters of a block their randomness, where there is any and they drop something.

    Calls of dense layers pass no key; only adapters need one.
    """
    if key is None:
        return
    adapters = [module for _, module in nnx.iter_modules(block) if isinstance(module, Adapter)]
    for number, adapter in enumerate(adapter for adapter in adapters if adapter.dropout):
        adapter.key = jax.random.fold_in(jax.random.fold_in(key, KEY), number)


def merged(params: Mapping, scale: float) -> dict:
    """Parameters whose weights have what their adapters add, without the adapters; traceable.

    Args:
      params: nested dictionary, or a part of one, blocks stacked over layers.
      scale: of the adapters; see `LoRA.scale`.
    """
    if "table" in params and "adapter" in params:
        return {"table": params["table"] + scale * _table_delta(params)}
    if "weight" in params and "adapter" in params:
        weight, adapter = params["weight"], params["adapter"]
        a, b = adapter["a"]["weight"], adapter["b"]["weight"]
        spec = jax.typeof(weight).sharding.spec
        # One product a layer; sums over the rank are in float32.
        dimensions = ((a.ndim - 1,), (1,)), ((0,), (0,))
        whole = jax.reshard(b, jax.sharding.PartitionSpec(*(None,) * b.ndim))
        added = jax.lax.dot_general(a, whole, dimensions, precision="highest", out_sharding=spec)
        rest = {name: leaf for name, leaf in params.items() if name != "adapter"}
        return rest | {"weight": weight + scale * added}
    return {
        name: merged(part, scale) if isinstance(part, Mapping) else part
        for name, part in params.items()
    }


def _table_delta(params: Mapping) -> Float[Array, "rows width"]:
    """A B of a table's adapter, cut over the mesh as the table is."""
    a, b = (params["adapter"][part]["weight"] for part in "ab")
    whole = jax.reshard(b, jax.sharding.PartitionSpec(None, None))
    spec = jax.typeof(params["table"]).sharding.spec
    return jnp.einsum("wr,rv->vw", a, whole, precision="highest", out_sharding=spec)
