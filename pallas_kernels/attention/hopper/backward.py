"""The backward kernels: one for the gradients of queries, one for those of keys and values.

Each visits non-empty tiles alone, and no two programs add to one number: results are the same in
every run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention.hopper.forward import COMPUTING, block_tiles, copy_keys, fill, slot_of
from pallas_kernels.attention.hopper.launch import launch, matrix, out
from pallas_kernels.attention.hopper.lists import HopperTileLists
from pallas_kernels.attention.hopper.pairs import HopperPairs
from pallas_kernels.attention.hopper.plan import KernelPlan
from pallas_kernels.attention.hopper.warpgroup import Warpgroup, spread
from pallas_kernels.pallas import pl, plgpu


def query_gradients(
    plan: KernelPlan,
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    d_output: Float[Array, "batch query heads value_dim"],
    lse: Float[Array, "batch heads query"],
    delta: Float[Array, "batch heads query"],
    lists: HopperTileLists,
    inputs: dict[str, Any],
) -> Float[Array, "batch query heads head_dim"]:
    """Gradient of q of arrays that are padded to whole blocks.

    Args:
        lse: times log2(e).
        delta: sum of a row's output times its gradient, less the gradient of its log-sum-exp.
    """
    batch, queries, heads, head_dim = q.shape
    rows, keys = plan.blocks.rows, plan.blocks.query_gradient_keys
    scratch = {
        "q": matrix((COMPUTING, rows, head_dim), q.dtype),
        "d_output": matrix((COMPUTING, rows, v.shape[-1]), q.dtype),
        "rows_ready": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING),
    }
    widths = {"k": head_dim, "v": v.shape[-1]}
    for (name, width), stages in zip(widths.items(), plan.blocks.query_gradient_stages):
        scratch[name] = matrix((stages, keys, width), q.dtype)
        scratch[f"{name}_ready"] = plgpu.Barrier(num_barriers=stages)
        scratch[f"{name}_free"] = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
    arrays = {"q": q, "k": k, "v": v, "d_output": d_output, "lse": lse, "delta": delta}
    arrays |= {"lists": lists, "inputs": inputs}
    outputs = {"d_q": out(q.shape, q.dtype, q)}
    grid = {"head": heads, "block": queries // (COMPUTING * rows), "batch": batch}
    body = functools.partial(_query_kernel, plan)
    return launch("query_gradients", body, arrays, outputs, scratch, grid, plan)["d_q"]


def _query_kernel(plan: KernelPlan, refs, at) -> None:
    """Gradients of one block of queries of one head."""
    group, wg = Warpgroup(bool(plan.interpret)), lax.axis_index("wg")
    tiles = block_tiles(refs["lists"], at)

    @pl.when(wg < COMPUTING)
    def _compute():
        group.register_limit(240, "increase")
        _query_rows(plan, group, refs, at, tiles, wg)

    @pl.when(wg == COMPUTING)
    def _copy():
        group.register_limit(24, "decrease")
        copy_keys(refs, at, plan.group, tiles, plan.blocks.query_gradient_keys)


def _query_rows(plan: KernelPlan, group: Warpgroup, refs, at, tiles, wg) -> None:
    """Gradients of the queries of one warpgroup."""
    rows = plan.blocks.rows
    block, full, total, _ = tiles
    start = (block * COMPUTING + wg) * rows
    where = at["batch"], pl.ds(start, rows), at["head"]
    ready = refs["rows_ready"].at[wg]
    for name in ("q", "d_output"):
        plgpu.copy_gmem_to_smem(refs["arrays"][name].at[where], refs[name].at[wg], ready)
    vectors = at["batch"], at["head"], pl.ds(start, rows)
    lse, delta = (group.load(refs["arrays"][name].at[vectors], 0) for name in ("lse", "delta"))
    plgpu.barrier_wait(ready)

    step = functools.partial(_query_tile, plan, group, refs, at, tiles, start, wg, lse, delta)
    d_q = group.full((rows, refs["q"].shape[-1]), 0.0)
    d_q = lax.fori_loop(0, full, functools.partial(step, masked=False), d_q)
    d_q = lax.fori_loop(full, total, functools.partial(step, masked=True), d_q)
    refs["q"].at[wg][...] = (d_q * plan.scale).astype(refs["q"].dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs["q"].at[wg], refs["outputs"]["d_q"].at[where])
    plgpu.wait_smem_to_gmem(0)


def _query_tile(plan, group, refs, at, tiles, start, wg, lse, delta, index, d_q, *, masked):
    """The gradients of queries with those from one tile of keys."""
    size, shape = (
        plan.blocks.query_gradient_keys,
        (plan.blocks.rows, plan.blocks.query_gradient_keys),
    )
    k_slot, v_slot = (group.opaque(slot_of(refs, name, index)) for name in ("k", "v"))
    where = at["batch"], at["head"], start, tiles[3][index] * size
    pairs = HopperPairs(plan, group, refs["inputs"], *where, shape)
    plgpu.barrier_wait(refs["k_ready"].at[k_slot])
    wg = group.opaque(wg)
    products = group.product([(refs["q"].at[wg], refs["k"].at[k_slot])], shape)
    _, marked = _weights(pairs, products, spread(lse, shape, 0), masked, refs["q"].dtype)
    plgpu.barrier_wait(refs["v_ready"].at[v_slot])
    d_weights = group.product([(refs["d_output"].at[wg], refs["v"].at[v_slot])], shape)
    plgpu.barrier_arrive(refs["v_free"].at[v_slot])
    d_scores = _score_gradients(plan, marked, d_weights, spread(delta, shape, 0))
    d_q = group.accumulate(d_q, d_scores, refs["k"].at[k_slot])
    plgpu.barrier_arrive(refs["k_free"].at[k_slot])
    return d_q


def _weights(pairs: HopperPairs, products, lse, masked: bool, dtype):
    """Weights after dropout, and what gradients are multiplied by, both in 16 bits.

    That is the weights times the derivative of the softcap, and negative where dropout zeroes them:
    16 registers less than with two arrays of 32 bits, of which a warpgroup has none to spare. The
    rounding is that of the gradients of scores once more.
    """
    scores, gain = pairs.logits(products)
    weights = jnp.exp2(scores - lse)
    if masked:
        weights = pairs.masked(weights, 0.0)
    marked = weights if gain is None else weights * gain
    if pairs.plan.dropout is not None:
        kept = pairs.kept()
        marked = jnp.where(kept, marked, -marked)
        weights = jnp.where(kept, weights, 0.0)
    return weights.astype(dtype), marked.astype(dtype)


def _score_gradients(plan: KernelPlan, marked, d_weights, delta):
    """Gradients of the scores before softcap and scale, in 16 bits."""
    # Not unpacked before the product is there: that would take twice the registers meanwhile.
    marked, d_weights = lax.optimization_barrier((marked, d_weights))
    weights = marked.astype(jnp.float32)
    if plan.dropout is None:
        return (weights * (d_weights - delta)).astype(marked.dtype)
    kept = weights > 0
    d_weights = jnp.where(kept, d_weights * (1.0 / (1.0 - plan.dropout)), 0.0)
    return (jnp.abs(weights) * (d_weights - delta)).astype(marked.dtype)


def key_gradients(
    plan: KernelPlan,
    parts: int,
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    d_output: Float[Array, "batch query heads value_dim"],
    lse: Float[Array, "batch heads query"],
    delta: Float[Array, "batch heads query"],
    lists: HopperTileLists,
    inputs: dict[str, Any],
) -> tuple[
    Float[Array, "batch key kv_heads head_dim"], Float[Array, "batch key kv_heads value_dim"]
]:
    """Gradients of k and v of arrays that are padded to whole blocks: see `query_gradients`.

    Args:
        parts: 1: each computing warpgroup has keys of its own; 2: both have the same keys, and each
            one half of the columns of their gradients.
    """
    batch, keys, kv_heads, head_dim = k.shape
    value_dim, blocks = v.shape[-1], plan.blocks
    stages, rows, queries = blocks.key_gradient_stages, blocks.rows, blocks.key_gradient_queries
    sets, widths = COMPUTING // parts, {"q": head_dim // parts, "d_output": value_dim // parts}
    scratch = {
        "k": matrix((sets, parts, rows, widths["q"]), q.dtype),
        "v": matrix((sets, parts, rows, widths["d_output"]), q.dtype),
        "keys_ready": plgpu.Barrier(num_arrivals=2 * parts, num_barriers=sets),
        "done": plgpu.Barrier(num_arrivals=COMPUTING),
    }
    for name, vector in (("q", "lse"), ("d_output", "delta")):
        scratch[name] = matrix((stages, parts, queries, widths[name]), q.dtype)
        scratch[vector] = plgpu.SMEM((stages, queries), jnp.float32)
        scratch[f"{name}_ready"] = plgpu.Barrier(num_arrivals=parts + 1, num_barriers=stages)
        scratch[f"{name}_free"] = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
    arrays = {"q": q, "k": k, "v": v, "d_output": d_output, "lse": lse, "delta": delta}
    arrays |= {"lists": lists, "inputs": inputs}
    outputs = {"d_k": out(k.shape, k.dtype, k), "d_v": out(v.shape, v.dtype, v)}
    grid = {"head": kv_heads, "block": keys // (sets * rows), "batch": batch}
    body = functools.partial(_key_kernel, plan, parts)
    results = launch("key_gradients", body, arrays, outputs, scratch, grid, plan)
    return results["d_k"], results["d_v"]


def _key_kernel(plan: KernelPlan, parts: int, refs, at) -> None:
    """Gradients of one block of keys and values of one key head."""
    group, wg = Warpgroup(bool(plan.interpret)), lax.axis_index("wg")
    tiles = block_tiles(refs["lists"], at)

    @pl.when(wg < COMPUTING)
    def _compute():
        group.register_limit(240, "increase")
        _key_rows(plan, parts, group, refs, at, tiles, wg)

    @pl.when(wg == COMPUTING)
    def _copy():
        group.register_limit(24, "decrease")
        _copy_queries(plan, parts, refs, at, tiles)


def _copy_queries(plan: KernelPlan, parts: int, refs, at, tiles) -> None:
    """Brings what belongs to the queries of every tile to shared memory, head after head."""
    _, _, total, order = tiles
    size, vectors = plan.blocks.key_gradient_queries, {"q": "lse", "d_output": "delta"}

    def copy(name, index, slot, ready):
        member = lax.div(index, total)
        head = at["head"] * plan.group + member
        rows = pl.ds(order[index - member * total] * size, size)
        vector = vectors[name]
        source = refs["arrays"][vector].at[at["batch"], head, rows]
        plgpu.copy_gmem_to_smem(source, refs[vector].at[slot], ready)
        for part in range(parts):
            source = _part(refs["arrays"][name].at[at["batch"], rows, head], part, parts)
            plgpu.copy_gmem_to_smem(source, refs[name].at[slot, part], ready)

    fill(refs, ("q", "d_output"), total * plan.group, copy)


def _part(reference, part: int, parts: int):
    """One of the equal parts of a matrix's columns."""
    width = reference.shape[1] // parts
    return reference if parts == 1 else reference.at[:, pl.ds(part * width, width)]


def _key_rows(plan: KernelPlan, parts: int, group: Warpgroup, refs, at, tiles, wg) -> None:
    """Gradients of the keys, or of the columns of keys, of one warpgroup."""
    rows, sets = plan.blocks.rows, COMPUTING // parts
    block, full, total, _ = tiles
    own, column = (wg, 0) if parts == 1 else (0, wg)
    start = (block * sets + own) * rows
    where = at["batch"], pl.ds(start, rows), at["head"]

    @pl.when(wg < sets)
    def _copy():
        for name in ("k", "v"):
            for part in range(parts):
                source = _part(refs["arrays"][name].at[where], part, parts)
                plgpu.copy_gmem_to_smem(
                    source, refs[name].at[own, part], refs["keys_ready"].at[own]
                )

    plgpu.barrier_wait(refs["keys_ready"].at[own])
    carry = tuple(group.full((rows, refs[name].shape[-1]), 0.0) for name in ("k", "v"))

    def of_head(member, carry):
        step = functools.partial(
            _key_tile, plan, parts, group, refs, at, tiles, start, (own, column), member
        )
        carry = lax.fori_loop(0, full, functools.partial(step, masked=False), carry)
        return lax.fori_loop(full, total, functools.partial(step, masked=True), carry)

    if plan.group == 1:
        d_k, d_v = of_head(0, carry)
    else:
        d_k, d_v = lax.fori_loop(0, plan.group, of_head, carry)
    if plan.dropout is not None:
        d_v = d_v * (1.0 / (1.0 - plan.dropout))
    _write_keys(plan, parts, refs, where, own, column, d_k * plan.scale, d_v)


def _key_tile(plan, parts, group, refs, at, tiles, start, mine, member, index, carry, *, masked):
    """Gradients of keys and values with those from one tile of queries of one head."""
    d_k, d_v = carry
    own, column = (group.opaque(index) for index in mine)
    size, slot = plan.blocks.key_gradient_queries, slot_of(refs, "q", member * tiles[2] + index)
    shape = plan.blocks.rows, size
    head = at["head"] * plan.group + member
    where = at["batch"], head, tiles[3][index] * size, start
    pairs = HopperPairs(plan, group, refs["inputs"], *where, shape, query_axis=1)

    def product(keys: str, queries: str):
        both = [(refs[keys].at[own, part], refs[queries].at[slot, part]) for part in range(parts)]
        return group.product(both, shape)

    plgpu.barrier_wait(refs["q_ready"].at[slot])
    products = product("k", "q")
    lse = spread(group.load(refs["lse"].at[slot], 1), shape, 1)
    dropped, marked = _weights(pairs, products, lse, masked, refs["q"].dtype)
    plgpu.barrier_wait(refs["d_output_ready"].at[slot])
    d_v = group.accumulate(d_v, dropped, refs["d_output"].at[slot, column])
    d_weights = product("v", "d_output")
    delta = spread(group.load(refs["delta"].at[slot], 1), shape, 1)
    plgpu.barrier_arrive(refs["d_output_free"].at[slot])
    d_scores = _score_gradients(plan, marked, d_weights, delta)
    d_k = group.accumulate(d_k, d_scores, refs["q"].at[slot, column])
    plgpu.barrier_arrive(refs["q_free"].at[slot])
    return d_k, d_v


def _write_keys(plan: KernelPlan, parts: int, refs, where, own, column, d_k, d_v) -> None:
    """Writes gradients by way of the shared memory of keys and values."""
    if parts > 1:  # which the other warpgroup may read until here
        plgpu.barrier_arrive(refs["done"])
        plgpu.barrier_wait(refs["done"])
    for name, gradient in (("k", d_k), ("v", d_v)):
        target = refs[name].at[own, column]
        target[...] = gradient.astype(refs[name].dtype)
    plgpu.commit_smem()
    for name in ("k", "v"):
        width = refs[name].shape[-1]
        output = refs["outputs"][f"d_{name}"].at[where]
        if parts > 1:
            output = output.at[:, pl.ds(column * width, width)]
        plgpu.copy_smem_to_gmem(refs[name].at[own, column], output)
    plgpu.wait_smem_to_gmem(0)
