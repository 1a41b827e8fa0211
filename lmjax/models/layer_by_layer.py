"""An executor whose backward pass is written out: a scan over layers, and a scan back.

Inside of a `jax.shard_map`, jax (0.10 and 0.12) divides wrongly what the backward pass of a scan
needs of another `jax.shard_map` in its body, such as that of attention. Here each layer is
differentiated on its own, and no scan is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmjax.models.executor import REMAT_POLICIES, Blocks
from lmjax.models.stretches import pattern
from pallas_kernels.attention import Mask


def run_layer_by_layer(
    blocks: Blocks,
    x: Float[Array, "batch seq embed"],
    mask: Mask,
    tables: Any,
    cache: None = None,
) -> tuple[Float[Array, "batch seq embed"], None]:
    """Runs blocks as `scan_blocks` does, without a cache, whole periods of their windows."""
    windows = pattern(blocks.windows, blocks.group)
    masks = [dataclasses.replace(mask, window=window) for window in windows]

    def by_period(tree, entries):
        return tree if entries == 1 else jax.tree.map(lambda a: split_first(a, entries), tree)

    def period(params, x, bias, drawn, tables, masks):
        tables = tables._replace(bias=bias)
        for i, mask in enumerate(masks):
            own, auxiliary, *more = blocks.layer((*params, *drawn), i, len(masks))
            member = i % blocks.group
            x, _ = blocks.apply(own, x, mask, tables, None, *more, auxiliary, member)
        return x

    if blocks.remat != "none":
        period = jax.checkpoint(period, policy=REMAT_POLICIES[blocks.remat])
    params = by_period((blocks.params, blocks.auxiliary), len(windows) // blocks.group)
    drawn = by_period((blocks.keys, blocks.dropout), len(windows))
    given = drawn, tables._replace(bias=None), masks
    return scan_with_gradient(period, params, x, tables.bias, *given), None


def split_first(a: jax.Array, size: int) -> jax.Array:
    """[n, ...] as [n / size, size, ...]."""
    spec = tuple(jax.typeof(a).sharding.spec)
    return jax.lax.reshape(
        a, (a.shape[0] // size, size, *a.shape[1:]), out_sharding=jax.P(spec[0], None, *spec[1:])
    )


def scan_with_gradient(turn, params, x, shared, drawn, *given):
    """x after turn(params[i], x, shared, drawn[i], *given) for every i, one after another.

    Gradients go to params, x and shared. What a turn's backward needs is kept for each, as by
    `jax.lax.scan`, but for parameters, x and `shared`, which are there already.
    """
    structure = None  # of what is kept of a turn
    sources = []  # where each of its arrays is from: (name, index)

    def differentiated(params, x, shared, drawn, given):
        return jax.vjp(lambda *inputs: turn(*inputs, drawn, *given), params, x, shared)

    def forward(params, x, shared, drawn, given):
        def step(x, layer):
            nonlocal structure
            own, drawn = layer
            known = {"params": jax.tree.leaves(own), "shared": jax.tree.leaves(shared)}
            where = {id(a): (name, i) for name, group in known.items() for i, a in enumerate(group)}
            y, pull = differentiated(own, x, shared, drawn, given)
            arrays, structure = jax.tree.flatten(pull)
            kept, sources[:] = [], []
            for a in arrays:
                if id(a) not in where:
                    where[id(a)] = "kept", len(kept)
                    kept.append(a)
                sources.append(where[id(a)])
            return y, kept

        y, kept = jax.lax.scan(step, x, (params, drawn))
        return y, (params, shared, kept)

    def backward(saved, d_y):
        params, shared, kept = saved

        def step(carry, layer):
            d_x, d_shared = carry
            own, kept = layer
            groups = {"params": jax.tree.leaves(own), "shared": jax.tree.leaves(shared)}
            groups["kept"] = kept
            pull = jax.tree.unflatten(structure, [groups[name][i] for name, i in sources])
            d_own, d_x, more = pull(d_x)
            return (d_x, jax.tree.map(jnp.add, d_shared, more)), d_own

        start = d_y, jax.tree.map(jnp.zeros_like, shared)
        (d_x, d_shared), d_params = jax.lax.scan(step, start, (params, kept), reverse=True)
        return d_params, d_x, d_shared, None, None

    @jax.custom_vjp
    def run(params, x, shared, drawn, given):
        def step(x, layer):
            own, drawn = layer
            return turn(own, x, shared, drawn, *given), None

        return jax.lax.scan(step, x, (params, drawn))[0]

    run.defvjp(forward, backward)
    return run(params, x, shared, drawn, given)
