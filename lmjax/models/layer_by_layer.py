"""Layers of a part of a pipeline: a scan over them, and passes of their gradient, written out.

Inside of a `jax.shard_map`, jax (0.10 and 0.12) divides wrongly what the backward pass of a scan
needs of another `jax.shard_map` in its body, such as that of attention. Here each layer is
differentiated on its own, and no scan is. So backward can also be cut in two: gradients of
activations first, those of parameters later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmjax.models.executor import REMAT_POLICIES, Blocks
from lmjax.models.stretches import pattern
from lmjax.parallel.passes import Passes, SlotPasses, in_passes
from pallas_kernels.attention import Mask


def run_layer_by_layer(
    blocks: Blocks,
    x: Float[Array, "batch seq embed"],
    mask: Mask,
    tables: Any,
    cache: None = None,
) -> tuple[Float[Array, "batch seq embed"], None]:
    """Runs blocks as `scan_blocks` does, without a cache, whole periods of their windows.

    Their gradients are those of `layer_passes`.
    """
    period, (drawn, *given) = _period(blocks, mask, tables)
    params = _by_period(blocks, (blocks.params, blocks.auxiliary), blocks.group)

    def step(x, layer):
        own, drawn = layer
        return period(own, x, tables.bias, drawn, *given), None

    return jax.lax.scan(step, x, (params, drawn))[0], None


def layer_passes(
    blocks: Blocks, x: Float[Array, "batch seq embed"], mask: Mask, tables: Any
) -> SlotPasses:
    """The passes of `run_layer_by_layer`; slots have an entry for each period.

    Gradients of weights are those of the parameters, of `blocks.auxiliary` and of `tables.bias`.
    Of `x` the type alone is used.
    """
    period, (drawn, *given) = _period(blocks, mask, tables)
    own = blocks.params, blocks.auxiliary
    params, pull = jax.vjp(lambda tree: _by_period(blocks, tree, blocks.group), own)

    def passes(own: Any, drawn: Any) -> Passes:
        def run(weights, given, x):
            (own, bias), (drawn, given) = weights, given
            return period(own, x, bias, drawn, *given)

        return in_passes(run, (own, tables.bias), (drawn, given), x)

    layers = params, drawn, jnp.arange(periods := len(jax.tree.leaves(params)[0]))
    start = jax.tree.map(jnp.zeros_like, tables.bias)

    def once(x):
        return passes(*jax.tree.map(lambda a: a[0], layers[:2])).once(x)

    def forward(x, kept):
        def step(carry, layer):
            (x, kept), (*layer, number) = carry, layer
            x, values = passes(*layer).forward(x)
            return (x, kept.written(values, number)), None

        return jax.lax.scan(step, (x, kept), layers)[0]

    def backward(kept, more, d_y):
        def step(carry, layer):
            (d_y, more), (*layer, number) = carry, layer
            d_x, values = passes(*layer).backward(kept.read(number), d_y)
            return (d_x, more.written(values, number)), None

        return jax.lax.scan(step, (d_y, more), layers, reverse=True)[0]

    def weights(kept, more):
        def step(d_bias, layer):
            *layer, number = layer
            d_own, own = passes(*layer).weights(kept.read(number), more.read(number))
            return jax.tree.map(jnp.add, d_bias, own), d_own

        d_bias, d_params = jax.lax.scan(step, start, layers)
        return *pull(d_params)[0], d_bias

    def both(kept, d_y):
        def step(carry, layer):
            (d_y, d_bias), (*layer, number) = carry, layer
            d_x, (d_own, own) = passes(*layer).both(kept.read(number), d_y)
            return (d_x, jax.tree.map(jnp.add, d_bias, own)), d_own

        (d_x, d_bias), d_params = jax.lax.scan(step, (d_y, start), layers, reverse=True)
        return d_x, (*pull(d_params)[0], d_bias)

    return SlotPasses((periods,), once, forward, backward, weights, both)


def _period(blocks: Blocks, mask: Mask, tables: Any) -> tuple[Callable, tuple]:
    """A function that runs one period of windows, and what it is given beside its parameters.

    The function is (parameters, x, bias, what is drawn, *given) -> x; what is drawn is stacked over
    periods.
    """
    windows = pattern(blocks.windows, blocks.group)
    masks = [dataclasses.replace(mask, window=window) for window in windows]

    def period(params, x, bias, drawn, tables, masks):
        tables = tables._replace(bias=bias)
        for i, mask in enumerate(masks):
            own, auxiliary, *more = blocks.layer((*params, *drawn), i, len(masks))
            member = i % blocks.group
            x, _ = blocks.apply(own, x, mask, tables, None, *more, auxiliary, member)
        return x

    if blocks.remat != "none":
        period = jax.checkpoint(period, policy=REMAT_POLICIES[blocks.remat])
    drawn = _by_period(blocks, (blocks.keys, blocks.dropout), 1)
    return period, (drawn, tables._replace(bias=None), masks)


def _by_period(blocks: Blocks, tree: Any, layers: int) -> Any:
    """Arrays stacked over layers, or over groups of so many, as stacks over periods."""
    entries = len(pattern(blocks.windows, blocks.group)) // layers
    return tree if entries == 1 else jax.tree.map(lambda a: split_first(a, entries), tree)


def split_first(a: jax.Array, size: int) -> jax.Array:
    """[n, ...] as [n / size, size, ...]."""
    spec = tuple(jax.typeof(a).sharding.spec)
    return jax.lax.reshape(
        a, (a.shape[0] // size, size, *a.shape[1:]), out_sharding=jax.P(spec[0], None, *spec[1:])
    )
