"""The forward kernel: two warpgroups compute while a third one copies, as in FlashAttention-3.

(Shah et al. 2024, arXiv:2407.08608.) While one computing warpgroup takes exponentials the other has
the tensor cores. Each walks through the list of tiles of its block of queries: first full ones,
which pay for no mask, then partial ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention.hopper.launch import launch, matrix, out
from pallas_kernels.attention.hopper.lists import HopperTileLists
from pallas_kernels.attention.hopper.pairs import LOG2E, HopperPairs
from pallas_kernels.attention.hopper.plan import KernelPlan
from pallas_kernels.attention.hopper.warpgroup import Warpgroup, spread
from pallas_kernels.pallas import pl, plgpu

LOWEST = -1e30  # of a row's largest score: finite, so that differences are numbers
COMPUTING = 2  # warpgroups


def forward(
    plan: KernelPlan,
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv_heads head_dim"],
    v: Float[Array, "batch key kv_heads value_dim"],
    lists: HopperTileLists,
    inputs: dict[str, Any],
) -> tuple[Float[Array, "batch query heads value_dim"], Float[Array, "batch heads query"]]:
    """Output and log-sum-exp of arrays that are padded to whole blocks."""
    batch, queries, heads, head_dim = q.shape
    value_dim, blocks = v.shape[-1], plan.blocks
    stages, rows, keys = blocks.forward_stages, blocks.rows, blocks.forward_keys
    scratch = {
        "q": matrix((COMPUTING, rows, head_dim), q.dtype),
        "k": matrix((stages, keys, head_dim), q.dtype),
        "v": matrix((stages, keys, value_dim), q.dtype),
        "lse": plgpu.SMEM((COMPUTING, rows), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=COMPUTING),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=COMPUTING),
    }
    if value_dim != head_dim:  # else it is where the queries were
        scratch["output"] = matrix((COMPUTING, rows, value_dim), q.dtype)
    arrays = {"q": q, "k": k, "v": v, "lists": lists, "inputs": inputs}
    outputs = {
        "output": out((batch, queries, heads, value_dim), q.dtype, q),
        "lse": out((batch, heads, queries), jnp.float32, q),
    }
    grid = {"head": heads, "block": queries // (COMPUTING * rows), "batch": batch}
    body = functools.partial(_kernel, plan)
    results = launch("forward", body, arrays, outputs, scratch, grid, plan)
    return results["output"], results["lse"]


def _kernel(plan: KernelPlan, refs, at) -> None:
    """One block of queries of one head."""
    group, wg = Warpgroup(bool(plan.interpret)), lax.axis_index("wg")
    tiles = block_tiles(refs["lists"], at)

    @pl.when(wg < COMPUTING)
    def _compute():
        group.register_limit(240, "increase")
        _compute_rows(plan, group, refs, at, tiles, wg)

    @pl.when(wg == COMPUTING)
    def _copy():
        group.register_limit(24, "decrease")
        copy_keys(refs, at, plan.group, tiles, plan.blocks.forward_keys)


def block_tiles(lists, at):
    """The block that this program has, its numbers of full and of all tiles, and where they are."""
    batch = at["batch"] if lists.order.shape[0] > 1 else 0
    # What is read varies over the axes of a mesh, which a loop does not carry; sums do not.
    block = lists.longest[batch, at["block"]] + 0
    full, total = (lists.counts[batch, block, index] + 0 for index in (0, 1))
    return block, full, total, lists.order.at[batch, block]


def copy_keys(refs, at, shared_by: int, tiles, size: int) -> None:
    """Brings the keys and values of a list of tiles to shared memory, one after the other."""
    _, _, total, order = tiles
    head = lax.div(at["head"], jnp.int32(shared_by))

    def copy(name, index, slot, ready):
        keys = at["batch"], pl.ds(order[index] * size, size), head
        plgpu.copy_gmem_to_smem(refs["arrays"][name].at[keys], refs[name].at[slot], ready)

    fill(refs, ("k", "v"), total, copy)


def fill(refs, names: tuple[str, ...], total, copy: Callable) -> None:
    """Calls `copy(name, index, slot, ready)` for every index once its slot is free."""

    def wait(name, index):
        plgpu.barrier_wait(refs[f"{name}_free"].at[slot_of(refs, name, index)])

    def step(index, _):
        for name in names:
            slot = slot_of(refs, name, index)
            pl.when(index >= refs[name].shape[0])(functools.partial(wait, name, index))
            copy(name, index, slot, refs[f"{name}_ready"].at[slot])

    lax.fori_loop(0, total, step, None)
    for name in names:
        first = jnp.maximum(total - refs[name].shape[0], 0)
        lax.fori_loop(first, total, lambda index, _, name=name: wait(name, index), None)


def slot_of(refs, name: str, index):
    """The slot in shared memory of the tile with this index."""
    return lax.rem(index, jnp.int32(refs[name].shape[0]))


def _compute_rows(plan: KernelPlan, group: Warpgroup, refs, at, tiles, wg) -> None:
    """Attention of the queries of one warpgroup."""
    rows, value_dim = plan.blocks.rows, refs["v"].shape[-1]
    block, full, total, _ = tiles
    start = (block * COMPUTING + wg) * rows
    where = at["batch"], pl.ds(start, rows), at["head"]
    queries = refs["q"].at[wg]
    plgpu.copy_gmem_to_smem(refs["arrays"]["q"].at[where], queries, refs["q_ready"].at[wg])
    plgpu.barrier_wait(refs["q_ready"].at[wg])
    pl.when(total > 0)(lambda: plgpu.barrier_wait(refs["k_ready"].at[0]))
    pl.when(wg == 1)(lambda: _take_turn(refs))

    step = functools.partial(_tile, plan, group, refs, at, tiles, start, wg)
    carry = (
        group.full((rows, value_dim), 0.0),
        group.vector(rows, LOWEST, 0),
        group.vector(rows, 0.0, 0),
    )
    carry = lax.fori_loop(0, full, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(full, total, functools.partial(step, masked=True), carry)
    pl.when(wg == 0)(lambda: _take_turn(refs))
    _write(plan, refs, where, wg, *carry)


def _take_turn(refs) -> None:
    plgpu.barrier_arrive(refs["turn"])
    plgpu.barrier_wait(refs["turn"])


def _tile(plan: KernelPlan, group: Warpgroup, refs, at, tiles, start, wg, index, carry, *, masked):
    """One tile of keys: the new output before it is divided, largest score and sum of a row."""
    output, top, total = carry
    size, slot = plan.blocks.forward_keys, slot_of(refs, "k", index)
    shape = plan.blocks.rows, size
    where = at["batch"], at["head"], start, tiles[3][index] * size
    pairs = HopperPairs(plan, group, refs["inputs"], *where, shape)
    products = [(refs["q"].at[group.opaque(wg)], refs["k"].at[slot])]
    scores = group.product(products, shape, meanwhile=lambda: _take_turn(refs))
    plgpu.barrier_arrive(refs["k_free"].at[slot])

    weights, top, decay = _weights(plan, pairs, scores, top, masked)
    total = total * decay + jnp.sum(weights, axis=1)
    output = output * spread(decay, output.shape, 0)
    if plan.dropout is not None:
        weights = jnp.where(pairs.kept(), weights, 0.0)
    weights = weights.astype(refs["v"].dtype)
    # Before the other warpgroup's turn, not in the middle of its own products.
    output, top, total, weights = lax.optimization_barrier((output, top, total, weights))
    plgpu.barrier_arrive(refs["turn"])
    plgpu.barrier_wait(refs["v_ready"].at[slot])
    plgpu.barrier_wait(refs["turn"])

    def wait_for_next():
        ready = refs["k_ready"].at[slot_of(refs, "k", index + 1)]
        pl.when(index + 1 < tiles[2])(lambda: plgpu.barrier_wait(ready))

    output = group.accumulate(output, weights, refs["v"].at[slot], meanwhile=wait_for_next)
    plgpu.barrier_arrive(refs["v_free"].at[slot])
    return output, top, total


def _weights(plan: KernelPlan, pairs: HopperPairs, scores, top, masked: bool):
    """Exponentials less the largest score, that score, and what earlier sums are multiplied by."""
    bare = plan.softcap is None and not pairs.biased
    factor = plan.scale * LOG2E if bare else 1.0  # in one operation with the subtraction
    if not bare:
        scores, _ = pairs.logits(scores)
    if masked:
        scores = pairs.masked(scores, -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
    weights = jnp.exp2(scores * factor - spread(new_top, scores.shape, 0))
    return weights, new_top, jnp.exp2(top - new_top)


def _write(plan: KernelPlan, refs, where, wg, output, top, total) -> None:
    """Divides by the sums, and writes output and log-sum-exp."""
    blind = total == 0.0
    total = jnp.where(blind, 1.0, total)
    raised = 1.0 if plan.dropout is None else 1.0 / (1.0 - plan.dropout)
    output = output * spread(raised / total, output.shape, 0)
    target = refs.get("output", refs["q"]).at[wg]
    target[...] = output.astype(refs["q"].dtype)
    lse = jnp.where(blind, -jnp.inf, top * math.log(2) + jnp.log(total))
    refs["lse"].at[wg][...] = lse
    plgpu.commit_smem()
    batch, rows, head = where
    plgpu.copy_smem_to_gmem(target, refs["outputs"]["output"].at[where])
    plgpu.copy_smem_to_gmem(refs["lse"].at[wg], refs["outputs"]["lse"].at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)
