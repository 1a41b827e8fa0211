"""Parameters as decoding reads them: in the compute dtype, on a CPU apart and outputs first."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.models import TransformerConfig, abstract, dense_axes
from lmjax.models.executor import entry_of
from lmjax.models.outputs_first import DenseAxes
from lmjax.parallel import Layout


def decoding_weights(
    config: TransformerConfig, params: dict, before: Layout, layout: Layout, apart: bool
) -> dict:
    """Parameters as decoding reads them.

    Args:
      config: of the model.
      params: as `initialize`, a checkpoint or `interop` gives them, stacked or layer by layer.
      before: the layout that they have.
      layout: that they shall have.
      apart: whether each layer's parameters are by themselves.
    """
    shapes = abstract(config, before)[1]
    weights = sharded(cast_for_inference(config, params if apart else stacked(params)), shapes)
    if not apart:
        return weights
    blocks = weights.pop("blocks")
    turn = functools.partial(turned, config, before=before, after=layout)
    # One layer after another: there are no copies of all that lie otherwise.
    return {**turn(weights), "blocks": [turn({"blocks": one})["blocks"] for one in entries(blocks)]}


def turned(config: TransformerConfig, params: dict, before: Layout, after: Layout) -> dict:
    """The parameters of one layout for another, of those with outputs first or not; traceable."""
    if before.outputs_first == after.outputs_first:
        return params
    dense, turn = dense_axes(config), _outputs_first if after.outputs_first else _inputs_first

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        axes = dense.get(".".join(names))
        return leaf if axes is None else turn(axes, leaf)

    return jax.tree.map_with_path(one, params)


_outputs_first = jax.jit(DenseAxes.outputs_first, static_argnums=0)
_inputs_first = jax.jit(DenseAxes.inputs_first, static_argnums=0)


def layers_apart() -> bool:
    """True where decoding reads each layer's parameters by themselves.

    It does on CPUs, where XLA copies a layer out of the stack for every token otherwise.
    """
    return jax.default_backend() == "cpu"


def stacked(params: dict) -> dict:
    """The parameters as the model has them, also where `blocks` is a list of layers; traceable.

    Of a model that is not scanned (`unroll=0`) XLA takes the layers, and the stack is never made.
    """
    if not isinstance(params["blocks"], list):
        return params
    blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *params["blocks"])
    return {**params, "blocks": blocks}


def entries(blocks: dict | list[dict]) -> Iterator[dict]:
    """The parameters of each entry of the stack: of a layer, or of two that differ."""
    if isinstance(blocks, list):
        yield from blocks
        return
    for number in range(len(jax.tree.leaves(blocks)[0])):
        yield entry_of(blocks, number)


def sharded(params: dict, shapes: dict) -> dict:
    """The parameters as the shapes lie on the mesh, also where `blocks` is a list of layers."""

    def reshard(spec: PartitionSpec, a: jax.Array) -> jax.Array:
        return a if jax.typeof(a).sharding.spec == spec else jax.reshard(a, spec)

    specs = jax.tree.map(lambda shape: shape.sharding.spec, shapes)
    if isinstance(params["blocks"], list):
        inner = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs["blocks"])
        specs = {**specs, "blocks": [inner] * len(params["blocks"])}
    return jax.tree.map(reshard, specs, params)


def cast_for_inference(config: TransformerConfig, params: dict) -> dict:
    """The parameters, in the compute dtype where the model does nothing before casting them."""

    def cast(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # Of experts, and of what is of low rank: these compute in float32.
        exact = name.endswith(".router.weight") or ".adapter." in name
        only_cast = name == "head.table" or (name.endswith(".weight") and not exact)
        return leaf.astype(config.dtype) if only_cast else leaf

    return jax.tree.map_with_path(cast, params)
