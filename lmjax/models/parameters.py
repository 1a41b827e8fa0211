"""Parameters of a model: their shapes, and how they are drawn."""

from __future__ import annotations

import functools

import jax
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec
from jaxtyping import PRNGKeyArray

from lmjax.config import replace
from lmjax.models.lora import merged
from lmjax.models.quantized import QuantizedWeight, Stored, WeightCode, encoded
from lmjax.models.transformer import TransformerConfig
from lmjax.parallel import Layout


def abstract(config: TransformerConfig, layout: Layout) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and its parameters as shapes with shardings; allocates nothing."""
    graph, shapes = _traced(config, layout, jax.sharding.get_abstract_mesh())
    return graph, jax.tree.map(lambda leaf: leaf, shapes)  # dictionaries of the caller's own


@functools.lru_cache(maxsize=32)
def _traced(
    config: TransformerConfig, layout: Layout, mesh: jax.sharding.AbstractMesh
) -> tuple[nnx.GraphDef, dict]:
    """See `abstract`; `mesh` is the one that is set."""
    graph = None

    def make() -> dict:
        nonlocal graph
        graph, state = nnx.split(config.build(layout, nnx.Rngs(jax.random.key(0))))
        return nnx.to_pure_dict(state)

    shapes = jax.eval_shape(make)
    return graph, shapes


def initialize(
    config: TransformerConfig, layout: Layout, key: PRNGKeyArray
) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and freshly drawn parameters, each born on its own devices.

    Parameters are a plain nested dict; `nnx.merge(graph, params)` gives the model back.
    """
    graph, _ = abstract(config, layout)
    return graph, jax.jit(lambda key: draw_parameters(config, layout, key))(key)


def draw_parameters(config: TransformerConfig, layout: Layout, key: PRNGKeyArray) -> dict:
    """Parameters as a plain nested dict of sharded float32 arrays, drawn from `key`; traceable."""
    return nnx.to_pure_dict(nnx.state(config.build(layout, nnx.Rngs(key))))


def merge_adapters(params: dict, config: TransformerConfig) -> tuple[dict, TransformerConfig]:
    """The same model without adapters: what they add is in the weights, rounded to float32.

    Args:
      params: blocks stacked over layers; they are not given up.
      config: of the model; without adapters, all stays as it is.
    """
    if config.lora is None:
        return params, config
    params, config = with_base(params, config, None)
    without = jax.jit(functools.partial(merged, scale=config.lora.scale))(params)
    return without, replace(config, lora=None)


def with_base(
    params: dict, config: TransformerConfig, base: WeightCode | None
) -> tuple[dict, TransformerConfig]:
    """The same model with the frozen weights of its blocks kept in another way; see `LoRA.base`.

    One layer's weight at a time is whole on each device. Adapters stay as they are.

    Args:
      params: blocks stacked over layers; they are not given up.
      config: of the model, which has adapters.
      base: how the weights are kept; None: in float32.
    """
    before, after = config, replace(config, lora=replace(config.lora, base=base))
    if before.lora.base == base:
        return params, config
    flat = traverse_util.flatten_dict(params)
    # First what is kept of each weight becomes the weight, then the weight what shall be kept.
    for model, step in ((before, _decoded), (after, _encoded)):
        for path, weight in quantized_weights(model).items():
            mine = {name: leaf for name, leaf in flat.items() if name[: len(path)] == path}
            rest = {name: leaf for name, leaf in flat.items() if name not in mine}
            flat = rest | step(mine, path, weight)
    return traverse_util.unflatten_dict(flat), after


def _decoded(mine: dict, path: tuple[str, ...], weight: QuantizedWeight) -> dict:
    """The parameter that what is kept of it, by path, stands for."""
    stored = {name[-1]: leaf for name, leaf in mine.items()}
    spec = PartitionSpec(*jax.typeof(stored["codes"]).sharding.spec[1:])

    def decode(one: Stored) -> jax.Array:
        whole = weight.code.decode(jax.tree.map(_whole, one), weight.axis, weight.size)
        return jax.reshard(whole, spec)

    return {path: jax.jit(lambda layers: jax.lax.map(decode, layers))(stored)}


def _encoded(mine: dict, path: tuple[str, ...], weight: QuantizedWeight) -> dict:
    """Arrays that are kept of the parameter at `path`, by path, cut over the mesh as that is."""

    def encode(one: jax.Array) -> Stored:
        return encoded(one, weight.code, weight.axis)

    stored = jax.jit(lambda layers: jax.lax.map(encode, layers))(mine[path])
    return {(*path, name): leaf for name, leaf in stored.items()}


def _whole(a: jax.Array) -> jax.Array:
    return jax.reshard(a, PartitionSpec(*(None,) * a.ndim))


@functools.lru_cache(maxsize=32)
def quantized_weights(config: TransformerConfig) -> dict[tuple[str, ...], QuantizedWeight]:
    """The weights that are kept in few bits by path, all of them in blocks; see `LoRA.base`."""
    if config.lora is None or config.lora.base is None:
        return {}
    # Cut over no mesh, so that any fits.
    found = nnx.iter_modules(nnx.merge(*abstract(config, Layout(rules=()))))
    return {path: module for path, module in found if isinstance(module, QuantizedWeight)}
