"""Parameters as decoding reads them: layers apart, and in the compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.models import TransformerConfig
from lmjax.models.executor import entry_of


def decoding_weights(config: TransformerConfig, params: dict, shapes: dict, apart: bool) -> dict:
    """Parameters as decoding reads them.

    Args:
      config: of the model.
      params: as `initialize`, a checkpoint or `interop` gives them, stacked or layer by layer.
      shapes: how they lie on the mesh, stacked; see `Decoder.shapes`.
      apart: whether each layer's parameters are by themselves.
    """
    weights = sharded(cast_for_inference(config, params if apart else stacked(params)), shapes)
    if apart:
        weights["blocks"] = unstacked(weights["blocks"])
    return weights


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


def unstacked(blocks: dict | list[dict]) -> list[dict]:
    """The parameters of each entry of the stack: of a layer, or of two that differ."""
    if isinstance(blocks, list):
        return blocks
    entries = len(jax.tree.leaves(blocks)[0])
    return [entry_of(blocks, n) for n in range(entries)]


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
