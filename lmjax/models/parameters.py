"""Parameters of a model: their shapes, and how they are drawn."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from lmjax.config import replace
from lmjax.models.executor import Executor, scan_blocks
from lmjax.models.lora import merged
from lmjax.models.transformer import TransformerConfig
from lmjax.parallel import Layout


def abstract(
    config: TransformerConfig, layout: Layout, executor: Executor = scan_blocks
) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and its parameters as shapes with shardings; allocates nothing.

    The structure holds the executor; the parameters are the same with any.
    """
    graph, shapes = _traced(config, layout, executor, jax.sharding.get_abstract_mesh())
    return graph, jax.tree.map(lambda leaf: leaf, shapes)  # dictionaries of the caller's own


@functools.lru_cache(maxsize=32)
def _traced(
    config: TransformerConfig, layout: Layout, executor: Executor, mesh: jax.sharding.AbstractMesh
) -> tuple[nnx.GraphDef, dict]:
    """See `abstract`; `mesh` is the one that is set."""
    graph = None

    def make() -> dict:
        nonlocal graph
        graph, state = nnx.split(config.build(layout, nnx.Rngs(jax.random.key(0)), executor))
        return nnx.to_pure_dict(state)

    shapes = jax.eval_shape(make)
    return graph, shapes


def initialize(
    config: TransformerConfig,
    layout: Layout,
    key: PRNGKeyArray,
    executor: Executor = scan_blocks,
) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and freshly drawn parameters, each born on its own devices.

    Parameters are a plain nested dict; `nnx.merge(graph, params)` gives the model back.
    """
    graph, _ = abstract(config, layout, executor)
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
    without = jax.jit(functools.partial(merged, scale=config.lora.scale))(params)
    return without, replace(config, lora=None)
