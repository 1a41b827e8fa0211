"""Parameters of a model: their shapes, and how they are drawn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import PRNGKeyArray

from lmjax.config import replace
from lmjax.models.lora import merged
from lmjax.models.quantization import Quantization
from lmjax.models.quantized import QuantizedWeight, WeightForm
from lmjax.models.transformer import TransformerConfig
from lmjax.models.weight_codes import Stored, WeightCode
from lmjax.parallel import Layout, training_layout

INPUT_SCALE = "input_scale"


def abstract(config: TransformerConfig, layout: Layout) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and its parameters as shapes with shardings; allocates nothing."""
    graph, shapes = _traced(config, layout, jax.sharding.get_abstract_mesh())
    return graph, jax.tree.map(lambda leaf: leaf, shapes)  # dictionaries of the caller's own


@functools.lru_cache(maxsize=32)
def _traced(
    config: TransformerConfig, layout: Layout, mesh: jax.sharding.AbstractMesh
) -> tuple[nnx.GraphDef, dict]:
    """See `abstract`; `mesh` is the one that is set."""
    return _built.eval_shape(config, layout, jax.eval_shape(lambda: jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once for all models of one config
def _built(
    config: TransformerConfig, layout: Layout, key: PRNGKeyArray
) -> tuple[nnx.GraphDef, dict]:
    """A model's structure and its parameters, drawn from `key`."""
    graph, state = nnx.split(config.build(layout, nnx.Rngs(key)))
    return graph, nnx.to_pure_dict(state)


def initialize(
    config: TransformerConfig, layout: Layout, key: PRNGKeyArray
) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and freshly drawn parameters, each born on its own devices.

    Parameters are a plain nested dict; `nnx.merge(graph, params)` gives the model back.
    """
    return _built(config, layout, key)


def draw_parameters(config: TransformerConfig, layout: Layout, key: PRNGKeyArray) -> dict:
    """Parameters as a plain nested dict of sharded float32 arrays, drawn from `key`; traceable."""
    return _built(config, layout, key)[1]


def merge_adapters(params: dict, config: TransformerConfig) -> tuple[dict, TransformerConfig]:
    """The same model without adapters: what they add is in the weights, rounded to float32.

    Args:
      params: blocks stacked over layers; they are not given up.
      config: of the model; without adapters, all stays as it is.
    """
    if config.lora is None:
        return params, config
    params, config = with_base(params, config, None)
    params, config = with_quantization(params, config, None)
    return _merged(params, scale=config.lora.scale), replace(config, lora=None)


_merged = jax.jit(merged, static_argnames="scale")


def with_base(
    params: dict, config: TransformerConfig, base: WeightCode | None
) -> tuple[dict, TransformerConfig]:
    """The same model with the frozen weights of its blocks kept in another way; see `LoRA.base`.

    Args:
      params: blocks stacked over layers; they are not given up.
      config: of the model, which has adapters, and no `quantization` where there is a base.
      base: how the weights are kept; None: in float32.
    """
    after = replace(config, lora=replace(config.lora, base=base))
    return recoded(params, config, after), after


def with_quantization(
    params: dict, config: TransformerConfig, quantization: Quantization | None
) -> tuple[dict, TransformerConfig]:
    """The same model with its weights kept in another way, each the nearest there is.

    Scales of inputs, which calibration finds, are those before where both have them, or else 1.

    Args:
      params: blocks stacked over layers; they are not given up.
      config: of the model.
      quantization: how its weights are kept; None: in float32.
    """
    after = replace(config, quantization=quantization)
    return recoded(params, config, after), after


def recoded(params: dict, before: TransformerConfig, after: TransformerConfig) -> dict:
    """Parameters of one config for another, which differs in how weights are kept.

    One layer's weight at a time is whole on each device.
    """
    old, new = quantized_weights(before), quantized_weights(after)
    same = {path for path in old.keys() & new.keys() if old[path] == new[path]}
    flat = traverse_util.flatten_dict(params)
    # First what is kept of each weight becomes the weight, then the weight what shall be kept.
    for forms, step in ((old, _decoded), (new, _encoded)):
        for path in forms.keys() - same:
            mine = {name: leaf for name, leaf in flat.items() if name[: len(path)] == path}
            rest = {name: leaf for name, leaf in flat.items() if name not in mine}
            flat = rest | step(mine, path, forms[path])
    scales, found = _input_scales(after), {n for n in flat if n[-1] == INPUT_SCALE}
    flat = {name: leaf for name, leaf in flat.items() if name not in found - scales.keys()}
    fresh = {name: jnp.ones(scales[name], jnp.float32) for name in scales.keys() - found}
    return traverse_util.unflatten_dict(flat | fresh)


def _decoded(mine: dict, path: tuple[str, ...], form: WeightForm) -> dict:
    """The parameter that what is kept of it, by path, stands for."""
    stored = {name[-1]: leaf for name, leaf in mine.items()}
    form = dataclasses.replace(form, layout=training_layout())
    return {path: _decode(stored, form, stacked_path(path))}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _decode(kept: Stored, form: WeightForm, stacked: bool) -> jax.Array:
    """The weight that is kept; of a stack, one layer after another."""

    def decode(one: Stored) -> jax.Array:
        return form.read(one, whole=False)

    return jax.lax.map(decode, kept) if stacked else decode(kept)


def _encoded(mine: dict, path: tuple[str, ...], form: WeightForm) -> dict:
    """Arrays that are kept of the parameter at `path`, by path, cut over the mesh as that is."""
    form = dataclasses.replace(form, layout=training_layout())
    stored = _encode(mine[path], form, stacked_path(path))
    return {(*path, name): leaf for name, leaf in stored.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(weight: jax.Array, form: WeightForm, stacked: bool) -> Stored:
    """Arrays that are kept of a weight; of a stack, one layer after another."""
    return jax.lax.map(form.encode, weight) if stacked else form.encode(weight)


def stacked_path(path: Sequence[str]) -> bool:
    """Returns whether the parameter at this path has an axis over layers."""
    return "blocks" in path


@functools.lru_cache(maxsize=32)
def quantized_weights(config: TransformerConfig) -> dict[tuple[str, ...], WeightForm]:
    """Forms of the weights that are kept in few bits by path; their layout is empty.

    See `LoRA.base` and `TransformerConfig.quantization`. Those of blocks are of one layer.
    """
    if config.quantization is None and (config.lora is None or config.lora.base is None):
        return {}
    # Cut over no mesh, so that any fits.
    found = nnx.iter_modules(nnx.merge(*abstract(config, Layout(rules=()))))
    return {path: module.form for path, module in found if isinstance(module, QuantizedWeight)}


@functools.lru_cache(maxsize=32)
def _input_scales(config: TransformerConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of the scales of inputs by path."""
    if config.quantization is None or config.quantization.activations is None:
        return {}
    flat = traverse_util.flatten_dict(abstract(config, Layout(rules=()))[1])
    return {path: leaf.shape for path, leaf in flat.items() if path[-1] == INPUT_SCALE}
